"""What data cost: a generated file of many pairs from text to batches, and SFT with padded and packed micro-batches.

`python benchmarks/data.py [--pairs 1000000] [--workers 1 2] [--steps 20]` writes benchmarks/results/data.md. Every
preparation is a process of its own; its memory is that of the process with the most, its children counted singly.
"""

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.machine import processor  # noqa: E402

LIMITS = {"max_prompt_length": 256, "max_response_length": 256}


def generate(path: Path, pairs: int) -> None:
    """Write pairs of random words: prompts of 5 to 60, answers of 5 to 120, as long as those of public chat data."""
    random.seed(0)
    words = ["".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=random.randint(2, 9))) for _ in range(5000)]

    def text(least: int, most: int) -> str:
        return " ".join(random.choices(words, k=random.randint(least, most)))

    with path.open("w", encoding="utf-8") as file:
        for number in range(pairs):
            row = {"prompt": f"{number} {text(5, 60)}", "chosen": text(5, 120), "rejected": text(5, 120)}
            file.write(json.dumps(row) + "\n")


def prepare_once(path: str, tokenizer: str, cache: str, workers: int) -> None:
    """In a process of its own: prepare the file, go through one epoch's order, print seconds and memory as JSON."""
    from rlhf.config.schema import DataConfig, SourceConfig
    from rlhf.data.loader import GlobalLoader
    from rlhf.data.prepare import prepare_data

    data = DataConfig(name="many", sources={"main": SourceConfig(path=path)}, workers=workers, **LIMITS)
    started = time.perf_counter()
    prepared = prepare_data(data, tokenizer_dir=Path(tokenizer), cache_dir=Path(cache))
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    loader = GlobalLoader(prepared.part("rm", False), batch_size=64, collate=len, seed=1, rank=0, ranks=2, epochs=None)
    rows = sum(size for _, size in zip(range(500), loader, strict=False))
    reading = time.perf_counter() - started
    own, children = (
        resource.getrusage(who).ru_maxrss / 1024**2 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    counts = prepared.counts
    kept = sum(part["rows"] for part in counts["parts"].values())
    print(
        json.dumps(
            {
                "seconds": seconds,
                "rows": kept,
                "read": sum(counts["read"].values()),
                "own": own,
                "child": children,
                "reading": rows / reading,
            }
        )
    )


def measured(path: Path, tokenizer: Path, cache: Path, workers: int) -> dict[str, Any]:
    """Run `prepare_once`."""
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from benchmarks.data import prepare_once; "
    script += f"prepare_once({str(path)!r}, {str(tokenizer)!r}, {str(cache)!r}, {workers})"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd=ROOT)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def train(folder: Path, *, packing: bool, source: Path, steps: int) -> dict[str, float]:
    """Tokens per second and padding of SFT on two ranks, medians of the steps after the first five."""
    run_dir = folder / f"packing-{packing}"
    overrides = ["stage=sft", "data=files", f"data.sources.main.path={source}", f"stage.max_steps={steps}"]
    overrides += [f"data.{key}={value}" for key, value in LIMITS.items()]
    overrides += ["model.scratch.max_positions=512", "stage.eval_examples=64", "data.on_long_prompt=skip", "reuse=off"]
    overrides += ["stage.micro_batch_size_per_gpu=32", f"stage.packing={str(packing).lower()}", f"run_dir={run_dir}"]
    subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), *overrides], check=True, cwd=ROOT, stdout=subprocess.DEVNULL
    )
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "train/padding_share" in row][5:]
    return {
        "tokens/s": median(row["time/tokens_per_second"] for row in rows),
        "padding": sum(row["train/padding_share"] for row in rows) / len(rows),
    }


def to_maximum(source: Path, tokenizer_dir: Path) -> float:
    """The share of padding if every example were padded to the longest that may be, as DeepSpeed-Chat does."""
    from rlhf.models.tokenizer import encode_responses, load_tokenizer

    rows = [json.loads(line) for line in source.read_text().splitlines()[:2000]]
    texts = encode_responses(load_tokenizer(tokenizer_dir), [row["prompt"] + row["chosen"] for row in rows])
    return 1 - sum(len(ids) for ids in texts) / (len(texts) * sum(LIMITS.values()))


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, len(os.sched_getaffinity(0))])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--folder", type=Path, default=None, help="where the files go; a temporary folder if not given")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="rlhf-data-"))
    folder.mkdir(parents=True, exist_ok=True)
    from rlhf.config.schema import ModelConfig, ScratchConfig, WeightSource
    from rlhf.models.tokenizer import prepare_tokenizer

    path, small = folder / "pairs.jsonl", folder / "small.jsonl"
    generate(path, arguments.pairs)
    generate(small, 8000)
    texts = [json.loads(line)["prompt"] for line in small.read_text().splitlines()]
    model = ModelConfig(name="tiny", source=WeightSource.scratch, scratch=ScratchConfig())
    tokenizer = prepare_tokenizer(model, texts=lambda: iter(texts), fingerprint="benchmark", cache_dir=folder)
    lines = ["| path | seconds | rows/s | GiB, main process | GiB, one worker | rows/s of a rank's loader |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for workers in arguments.workers:
        cache = folder / f"cache-{workers}"
        shutil.rmtree(cache, ignore_errors=True)
        for label in (f"tokenised by {workers} process{'es' if workers > 1 else ''}", "found again"):
            row = measured(path, tokenizer, cache, workers)
            lines.append(
                f"| {label} | {row['seconds']:.1f} | {row['read'] / row['seconds']:,.0f} | {row['own']:.2f} | "
                f"{row['child']:.2f} | {row['reading']:,.0f} |"
            )
            print(lines[-1], flush=True)
    runs = {False: [], True: []}
    for _ in range(3):
        for packing, found in runs.items():
            found.append(train(folder / str(len(found)), packing=packing, source=small, steps=arguments.steps))
    speeds = {packing: median(run["tokens/s"] for run in found) for packing, found in runs.items()}
    sft = ["| SFT micro-batches of 32 | padding | tokens/s | ratio |", "|---|---:|---:|---:|"]
    longest, wasted = sum(LIMITS.values()), to_maximum(small, tokenizer)
    sft.append(f"| padded to the maximum of {longest} (counted, not run) | {wasted:.1%} | | |")
    for packing, label in ((False, "batches of similar length, padded"), (True, "packed")):
        padding = median(run["padding"] for run in runs[packing])
        sft.append(f"| {label} | {padding:.1%} | {speeds[packing]:,.0f} | {speeds[packing] / speeds[False]:.2f} |")
    write(lines, sft, arguments.pairs, path.stat().st_size)


def write(lines: list[str], sft: list[str], pairs: int, size: int) -> None:
    """Write benchmarks/results/data.md."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False).stdout
    text = [
        "# What data cost",
        "",
        f"- command: `python benchmarks/data.py --pairs {pairs}`",
        f"- commit: {commit.strip()}",
        f"- hardware: {processor()}",
        f"- file: {pairs:,} generated pairs, {size / 1024**2:,.0f} MiB of JSON Lines; no row is lost",
        "- SFT: the tiny model on two ranks, 8,000 pairs; medians of three runs in turns",
        "",
        *lines,
        "",
        *sft,
    ]
    target = ROOT / "benchmarks" / "results" / "data.md"
    target.write_text("\n".join(text) + "\n", encoding="utf-8")
    print(target.read_text())


if __name__ == "__main__":
    main()
