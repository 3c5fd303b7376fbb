"""Further facts that `worker.py` collects on each rank: what generates, under each ZeRO stage, adapted or not."""

import gc
import shutil
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf import DeepSpeedPPOTrainer, DeepSpeedRLHFEngine
from rlhf.batch import PromptBatch, Rollout
from rlhf.config.choices import Mismatch, RolloutBackend
from rlhf.config.errors import ConfigError, StoppedError
from rlhf.config.roles import Role
from rlhf.config.schema import Config, MemoryConfig, Precision
from rlhf.engine import build, generation, shared
from rlhf.engine.build import build_engine, partitioned_loading
from rlhf.engine.distributed import all_reduce_max, all_reduce_sum, rank, world_size
from rlhf.engine.generation import whole_parameters
from rlhf.engine.shared import shared_memory
from rlhf.launcher import ds_config
from rlhf.launcher.ds_config import deepspeed_config
from rlhf.models.load import load_causal_lm
from rlhf.models.lora import AdaptersOff, add_adapters
from rlhf.models.tokenizer import load_tokenizer
from rlhf.rollout.forward import response_logprobs
from rlhf.rollout.generate import Generator
from rlhf.rollout.native import backend
from rlhf.rollout.native.library import NotCompiledError
from rlhf.rollout.sampling import Sampling

GREEDY = Sampling(temperature=0.0, stop_ids=(1,), max_new_tokens=12, batch_size=3)
DRAWN = replace(GREEDY, temperature=1.0)
WAYS = (RolloutBackend.native, RolloutBackend.hf)


def plain_engine(folder: Path, memory: MemoryConfig, role: Role, *, adapted: bool = False) -> Any:
    """The miniature policy's engine, if adapted with adapters that change it."""
    tokenizer = load_tokenizer(folder / "policy")
    with partitioned_loading(role, memory=memory, ranks=world_size()):
        model = load_causal_lm(folder / "policy", tokenizer, dtype=torch.float32, attention="sdpa")
    if adapted:
        add_adapters(model, rank=4, alpha=8.0, dropout=0.0, targets=["q_proj", "v_proj", "fc1"], seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return build_engine(model, role, memory=memory, ranks=world_size())


def answers(engine: Any, prompts: PromptBatch, folder: Path, sampling: Sampling, **options: Any) -> Rollout:
    """The responses of one way to generate."""
    tokenizer = load_tokenizer(folder / "policy")
    generator = Generator(engine=engine, tokenizer=tokenizer, sampling=sampling, vocab_limit=len(tokenizer))
    said = generator.backend.description
    assert generator.native == (sampling.backend is not RolloutBackend.hf), said
    alone = generator.native and sampling.tensor_parallel == 1 and "adapters beside the weights" not in said
    assert (", compiled" in said) == (alone and shutil.which("g++") is not None), said
    return generator.generate(prompts, **options)


def tokens(rollout: Rollout) -> list[list[int]]:
    """Each row's response."""
    rows = zip(rollout.response_ids, rollout.response_mask, strict=True)
    return [ids[mask].tolist() for ids, mask in rows]


def weights(engine: Any) -> list[Tensor]:
    """All weights, whole."""
    with whole_parameters(engine, engine.module):
        return [parameter.detach().clone() for parameter in engine.module.parameters()]


def native_facts(
    folder: Path, prompts: PromptBatch, role: Role, memory: MemoryConfig, *, adapted: bool
) -> dict[str, float]:
    """Native decoding against transformers' generate, and what it leaves behind."""
    engine = plain_engine(folder, memory, role, adapted=adapted)
    before = weights(engine)
    native = answers(engine, prompts, folder, GREEDY)
    slow = answers(engine, prompts, folder, replace(GREEDY, backend=RolloutBackend.hf))
    limit = len(load_tokenizer(folder / "policy"))
    with torch.no_grad():
        computed = response_logprobs(engine, native, temperature=1.0, vocab_limit=limit)
    assert native.sampled_logprobs is not None
    facts = {
        "same": float(tokens(native) == tokens(slow)),
        "tokens": float(native.response_mask.sum()),
        "logprob_error": float((computed - native.sampled_logprobs).abs().max()),
        "restored": float(all(torch.equal(old, new) for old, new in zip(before, weights(engine), strict=True))),
    }
    if memory.zero_stage == 3:
        for together in (1, 20_000):  # Bytes: each parameter alone, and some of them at once.
            with patch.object(generation, "TOGETHER", together):
                alike = all(torch.equal(old, new) for old, new in zip(before, weights(engine), strict=True))
            facts[f"alike_by_{together}"] = float(alike)
        facts |= shared_facts(engine, before, folder, prompts)
    else:
        in_place = answers(engine, prompts, folder, replace(GREEDY, gather=False))
        facts["in_place"] = float(tokens(in_place) == tokens(slow))
        with patch.object(backend, "load_library", side_effect=NotCompiledError("no compiler")):
            options: dict[str, Any] = {"tokenizer": load_tokenizer(folder / "policy"), "vocab_limit": limit}
            generator = Generator(engine=engine, sampling=GREEDY, **options)
        assert "not compiled: no compiler" in generator.backend.description
        facts["by_torch"] = float(tokens(generator.generate(prompts)) == tokens(slow))
    del native, slow, computed
    facts |= {f"further_bytes_{wanted.value}": further_bytes(engine, prompts, folder, wanted) for wanted in WAYS}
    if adapted:
        reference = AdaptersOff(engine)
        facts["reference_same"] = float(
            tokens(answers(reference, prompts, folder, GREEDY))
            == tokens(answers(reference, prompts, folder, replace(GREEDY, backend=RolloutBackend.hf)))
        )
        facts["reference_differs"] = float(
            tokens(answers(reference, prompts, folder, GREEDY)) != tokens(answers(engine, prompts, folder, GREEDY))
        )
    return facts


def further_bytes(engine: Any, prompts: PromptBatch, folder: Path, wanted: RolloutBackend) -> float:
    """What tensors take more on any rank after a rollout than before it, when its cache is given back."""
    tokenizer = load_tokenizer(folder / "policy")
    sampling = replace(GREEDY, backend=wanted, release_cache=True)
    generator = Generator(engine=engine, tokenizer=tokenizer, sampling=sampling, vocab_limit=len(tokenizer))
    before = living_bytes()
    generator.generate(prompts)
    return float(all_reduce_max(torch.tensor(float(living_bytes() - before))))


def living_bytes() -> int:
    """The memory of all tensors of this process, each piece counted once."""
    gc.collect()
    pieces: dict[int, int] = {}
    for each in gc.get_objects():
        if issubclass(type(each), Tensor):
            storage = each.untyped_storage()
            pieces[storage.data_ptr()] = max(storage.nbytes(), pieces.get(storage.data_ptr(), 0))
    return sum(pieces.values())


def shared_facts(engine: Any, before: list[Tensor], folder: Path, prompts: PromptBatch) -> dict[str, float]:
    """Weights that both ranks write into memory which they share, and generate from."""
    tokenizer = load_tokenizer(folder / "policy")
    sent = answers(engine, prompts, folder, GREEDY)
    options: dict[str, Any] = {"tokenizer": tokenizer, "vocab_limit": len(tokenizer)}
    # Also where a machine's processors have memory of their own.
    with patch.object(generation, "SHARED", 1), patch.object(shared, "NODES", folder / "none"):
        with patch.object(generation, "shared_memory", late_shared_memory), whole_parameters(engine, engine.module):
            mapped = shared_mappings()
            alike = are_alike(before, list(engine.module.parameters()))
            nested = raises_runtime_error(engine) and raises_runtime_error(engine, list(engine.module.children())[-1])
        partitioned = are_partitioned(engine.module)
        generator = Generator(engine=engine, sampling=GREEDY, **options)
        with generator.generation_mode():
            kept = shared_mappings()
            found = generator.generate(prompts)
        left = shared_mappings()
        own = shared._mapped if rank() == 0 else lambda *file: None  # A rank that cannot open the other's file.
        with patch.object(shared, "_mapped", own):
            refused = are_alike(before, weights(engine))
    return {
        "shared_alike": float(alike and refused),
        "shared_same": float(tokens(found) == tokens(sent)),
        "shared_nested": float(nested),
        "shared_mapped": float(mapped),
        "shared_kept": float(kept),
        "shared_left": float(left),
        "shared_partitioned": float(partitioned and are_partitioned(engine.module)),
    }


def late_shared_memory(count: int) -> Tensor | None:
    """Memory into which the second rank writes later than the first one."""
    memory = shared_memory(count)
    time.sleep(0.3 * rank())
    return memory


def are_alike(old: list[Tensor], new: list[Any]) -> bool:
    """Whether tensors equal others to the last bit."""
    return all(torch.equal(one, other) for one, other in zip(old, new, strict=True))


def are_partitioned(module: torch.nn.Module) -> bool:
    """Whether a module's parameters are, for DeepSpeed and in fact."""
    parameters: list[Any] = list(module.parameters())
    return all(each.numel() == 0 and each.ds_status is ZeroParamStatus.NOT_AVAILABLE for each in parameters)


def raises_runtime_error(engine: Any, part: torch.nn.Module | None = None) -> bool:
    """Whether a context around which there is another is refused, on every rank before anything is gathered."""
    try:
        with whole_parameters(engine, part or engine.module):
            return False
    except RuntimeError as error:
        return "cannot be nested" in str(error)


def prefetch_facts(folder: Path, prompts: PromptBatch, role: Role, memory: MemoryConfig) -> dict[str, float]:
    """Weights after steps of training and a forward pass, of which DeepSpeed has some whole, and some on their way."""

    def with_small_buckets(*arguments: Any, **options: Any) -> dict[str, Any]:
        config = ds_config.deepspeed_config(*arguments, **options)
        config["zero_optimization"] |= {
            "stage3_param_persistence_threshold": 40,
            "stage3_prefetch_bucket_size": 3000,
            "stage3_max_live_parameters": 8000,
            "stage3_max_reuse_distance": 0,
        }
        return config

    with patch.object(build, "deepspeed_config", with_small_buckets):
        engine = plain_engine(folder, memory, role)
    ids, mask = prompts.prompt_ids[:1], prompts.prompt_mask[:1].long()

    def forward() -> Any:
        return engine(input_ids=ids, attention_mask=mask, labels=ids).loss

    facts: dict[str, float] = {}
    for name, least in (("sent", 2**60), ("shared", 1)):
        for _ in range(4):
            engine.backward(forward())
            engine.step()
        with torch.no_grad():
            forward()
        states = {parameter.ds_status for parameter in engine.module.parameters()}
        facts[f"{name}_states"] = float(len(states))
        with patch.object(generation, "SHARED", least), patch.object(shared, "NODES", folder / "none"):
            found = weights(engine)
        engine.empty_partition_cache()
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
            facts[f"{name}_alike"] = float(are_alike(found, list(engine.module.parameters())))
    return facts | {"interrupted": float(interrupted_alike(engine, forward, folder))}


def interrupted_alike(engine: Any, forward: Callable[[], Any], folder: Path) -> bool:
    """Whether weights are right, and can be trained, after a forward pass that ended in the middle of a module."""
    part = next(part for part in engine.module.modules() if isinstance(part, torch.nn.Linear))
    with patch.object(type(part), "forward", side_effect=KeyError), suppress(KeyError):
        forward()
    with ExitStack() as within:
        within.enter_context(patch.object(generation, "SHARED", 1))
        within.enter_context(patch.object(shared, "NODES", folder / "none"))
        within.enter_context(whole_parameters(engine, engine.module))
        found = [parameter.detach().clone() for parameter in engine.module.parameters()]
        read = part.weight.detach().clone()  # As a module reads it, of which DeepSpeed takes notice.
    engine.empty_partition_cache()
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        alike = are_alike([*found, read], [*engine.module.parameters(), part.weight])
    engine.backward(forward())
    engine.step()
    return alike


def padding_facts(role: Role, memory: MemoryConfig) -> dict[str, float]:
    """Parameters whose elements the ranks cannot divide among them: some shards end in padding, one is nothing else."""
    with deepspeed.zero.Init(config_dict_or_path=deepspeed_config(role, memory=memory, ranks=world_size())):
        module = torch.nn.ModuleList([torch.nn.Linear(3, 7), torch.nn.Linear(1, 1), torch.nn.LayerNorm(5)])
    parameters: list[Any] = list(module.parameters())
    with deepspeed.zero.GatheredParameters(parameters):
        wanted = [parameter.detach().clone() for parameter in parameters]
    with patch.object(generation, "SHARED", 1), patch.object(shared, "NODES", Path("none")):
        try:
            with generation._shared(parameters):
                alike = are_alike(wanted, parameters) and shared_mappings() == 1
                raise KeyError
        except KeyError:
            left = shared_mappings()
    return {"alike": float(alike), "left": float(left), "partitioned": float(are_partitioned(module))}


def shared_mappings() -> int:
    """Mappings of shared memory files in this process."""
    return sum("/memfd:" in line for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines())


def neighbour_facts(folder: Path, prompts: PromptBatch, role: Role, memory: MemoryConfig) -> dict[str, float]:
    """Drawn responses of this rank's prompts, against those of all prompts answered on this rank, in other batches."""
    engine = plain_engine(folder, memory, role)
    count = len(prompts)
    everything = gathered(prompts)
    streams = torch.arange(len(everything))
    mine = slice(rank() * count, (rank() + 1) * count)
    own = answers(engine, everything.rows(mine), folder, DRAWN, seed=5, streams=streams[mine])
    whole = answers(engine, everything, folder, replace(DRAWN, batch_size=None), seed=5, streams=streams)
    other = answers(engine, everything, folder, DRAWN, seed=6, streams=streams)
    return {
        "same": float(tokens(own) == tokens(whole)[mine]),
        "seed_differs": float(tokens(other) != tokens(whole)),
        "rows_differ": float(len({tuple(row) for row in tokens(whole)}) > len(everything) // 2),
    }


def gathered(prompts: PromptBatch) -> PromptBatch:
    """The prompts of all ranks."""
    count = len(prompts)
    ids = torch.zeros(count * world_size(), prompts.prompt_ids.shape[1], dtype=torch.long)
    mask = torch.zeros_like(ids)
    ids[rank() * count : (rank() + 1) * count] = prompts.prompt_ids
    mask[rank() * count : (rank() + 1) * count] = prompts.prompt_mask.long()
    return PromptBatch(prompt_ids=all_reduce_sum(ids), prompt_mask=all_reduce_sum(mask).bool())


def stop_facts(folder: Path, prompts: PromptBatch, role: Role, memory: MemoryConfig) -> dict[str, float]:
    """Texts that end a response, for both ways; and what is left of the cache, also after an exception."""
    engine, tokenizer = plain_engine(folder, memory, role), load_tokenizer(folder / "policy")
    free = tokens(answers(engine, prompts, folder, GREEDY))
    text = tokenizer.decode(free[0][3:5])
    # The prompt and the beginning of the response read like this: it ends nothing.
    across = tokenizer.decode([int(prompts.prompt_ids[1, -1]), free[1][0]])
    stopped = [
        answers(engine, prompts, folder, replace(GREEDY, stop=(text, across), backend=backend)) for backend in WAYS
    ]
    generator = Generator(
        engine=engine,
        tokenizer=tokenizer,
        sampling=replace(GREEDY, release_cache=False),
        vocab_limit=len(tokenizer),
    )
    generator.generate(prompts)
    kept = generator.backend.arena.nbytes
    try:
        with generator.generation_mode():
            raise KeyError
    except KeyError:
        left = generator.backend.arena.nbytes
    again = tokens(generator.generate(prompts))
    ended = [None if rollout.ended is None else rollout.ended.tolist() for rollout in stopped]
    return {
        "same": float(tokens(stopped[0]) == tokens(stopped[1]) and ended[0] == ended[1]),
        "cut": float(tokens(stopped[0])[0] == free[0][: len(tokens(stopped[0])[0])] and bool((ended[0] or [0])[0])),
        "shorter": float(len(tokens(stopped[0])[0]) <= 5 < len(free[0])),
        "kept": float(kept > 0),
        "left": float(left),
        "again": float(again == free),
    }


def room_facts(folder: Path, prompts: PromptBatch, role: Role, memory: MemoryConfig) -> dict[str, float]:
    """Whether a rank without room for a single sequence says so: alone, or with those that share its weights."""
    engine, tokenizer = plain_engine(folder, memory, role), load_tokenizer(folder / "policy")
    facts = {}
    for ranks in (1, 2):
        sampling = replace(GREEDY, tensor_parallel=ranks, gather=ranks == 1)
        generator = Generator(engine=engine, tokenizer=tokenizer, sampling=sampling, vocab_limit=len(tokenizer))
        with patch.object(backend, "free_bytes", lambda device: 2**30 * (1 - rank())):
            try:
                generator.generate(prompts)
                refused = False
            except ConfigError as error:
                refused = "at most 50% of the 0.00 MiB that are free may be taken: lower" in str(error)
        facts[f"refused_{ranks}"] = float(all_reduce_sum(torch.tensor(float(refused))))
        assert tokens(generator.generate(prompts)), "it works again once there is room"
    return facts


def parallel_facts(
    folder: Path, prompts: PromptBatch, role: Role, memory: MemoryConfig, *, adapted: bool
) -> dict[str, float]:
    """Weights shared by two ranks, which hold different numbers of prompts, against whole ones on each rank."""
    engine = plain_engine(folder, memory, role, adapted=adapted)
    prompts = prompts.rows(slice(0, len(prompts) - rank()))
    parallel = replace(GREEDY, tensor_parallel=2, gather=False)
    streams = torch.arange(len(prompts)) + 10 * rank()
    divided, whole, slow = (
        answers(engine, prompts, folder, sampling, streams=streams)
        for sampling in (parallel, GREEDY, replace(parallel, backend=RolloutBackend.hf))
    )
    drawn, drawn_whole = (
        answers(engine, prompts, folder, replace(sampling, temperature=1.0), seed=5, streams=streams)
        for sampling in (parallel, GREEDY)
    )
    assert divided.sampled_logprobs is not None and whole.sampled_logprobs is not None
    return {
        "same": float(tokens(divided) == tokens(whole) == tokens(slow) and tokens(drawn) == tokens(drawn_whole)),
        "tokens": float(divided.response_mask.sum()),
        "logprob_error": float((divided.sampled_logprobs - whole.sampled_logprobs).abs().max()),
    }


def gate_facts(folder: Path, prompts: PromptBatch, config: Config) -> dict[str, float]:
    """What PPO does if generation and training disagree by more than a tolerance that nothing could meet."""
    tokenizer = load_tokenizer(folder / "policy")
    engine = DeepSpeedRLHFEngine(
        actor_model_name_or_path=str(folder / "policy"),
        critic_model_name_or_path=str(folder / "reward"),
        tokenizer=tokenizer,
        num_total_iters=4,
        args=config,
    )
    facts = {}
    for action in Mismatch:
        rollout = replace(config.rollout, mismatch=action, mismatch_tolerance=1e-12, importance_cap=2.0)
        trainer = DeepSpeedPPOTrainer(engine=engine, args=replace(config, rollout=rollout))
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                trainer.generate_experience(prompts)
            except StoppedError as error:
                facts["stopped"] = float("rollout.mismatch_tolerance" in str(error) and action is Mismatch.stop)
                continue
        said = next((str(each.message) for each in warned if "mismatch_tolerance" in str(each.message)), "")
        useless = "so that rollout.importance_cap does nothing" in said
        facts[f"{action.value}_said"] = float(bool(said) and useless == (action is Mismatch.hf))
        facts[f"{action.value}_native"] = float(trainer.generator.native)
        facts[f"{action.value}_logprobs"] = float(trainer.generator.gives_logprobs)
        metrics = trainer.metrics.flush(all_reduce_sum, all_reduce_max)
        facts["weight_error"] = abs(metrics["rollout/importance_weight"] - 1.0)
    return facts


def layerwise_facts(folder: Path, prompts: PromptBatch, role: Role) -> dict[str, float]:
    """Greedy answers under ZeRO-3, gathered whole and layer by layer, with unequal numbers of prompts on the ranks."""
    engine = plain_engine(folder, MemoryConfig(zero_stage=3, precision=Precision.fp32), role)
    prompts = prompts.rows(slice(0, len(prompts) - rank()))
    slow = replace(GREEDY, backend=RolloutBackend.hf)
    whole, layerwise = (answers(engine, prompts, folder, replace(slow, gather=gather)) for gather in (True, False))
    # Native decoding is not chosen for a policy that does not fit whole, and its ranks need not keep in step.
    uneven = answers(engine, prompts, folder, GREEDY)
    tokenizer = load_tokenizer(folder / "policy")
    options: dict[str, Any] = {"engine": engine, "tokenizer": tokenizer, "vocab_limit": len(tokenizer)}
    too_large = replace(GREEDY, gather=False)
    refused = ""
    try:
        Generator(sampling=replace(too_large, backend=RolloutBackend.native), **options)
    except ConfigError as error:
        refused = str(error)
    return {
        "falls_back": float(not Generator(sampling=too_large, **options).native),
        "refused": float("rollout.gather=true makes one" in refused),
        "same": float(tokens(whole) == tokens(layerwise) == tokens(uneven)),
        "tokens": float(whole.response_mask.sum()),
    }


def fallback_facts(folder: Path, prompts: PromptBatch, role: Role, memory: MemoryConfig) -> dict[str, float]:
    """A model of a family that native decoding does not know, whose weights are to be shared, too."""
    tokenizer = load_tokenizer(folder / "policy")
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    engine = build_engine(GPT2LMHeadModel(GPT2Config(**sizes, **ends)), role, memory=memory, ranks=world_size())
    options: dict[str, Any] = {"engine": engine, "tokenizer": tokenizer, "vocab_limit": len(tokenizer)}
    ways = (replace(GREEDY, tensor_parallel=2, gather=False), replace(GREEDY, backend=RolloutBackend.hf))
    generators = [Generator(sampling=sampling, **options) for sampling in ways]
    found, wanted = (tokens(generator.generate(prompts)) for generator in generators)
    said = generators[0].backend.description
    return {
        "said": float("does not do it for" in said and said.endswith("rollout.tensor_parallel=2 does nothing)")),
        "same": float(found == wanted and len(wanted[0]) > 1),
    }


def collect(folder: Path, config: Config, prompts: PromptBatch, role: Role) -> dict[str, Any]:
    """All facts; `config` is that of a small PPO run."""
    memory = config.memory
    role = replace(role, micro_batch_size_per_gpu=1)
    facts: dict[str, Any] = {"layerwise": layerwise_facts(folder, prompts, role)}
    for stage in (0, 1, 2, 3):
        for adapted in (False, True):
            facts[f"native_zero{stage}{'_lora' if adapted else ''}"] = native_facts(
                folder, prompts, role, replace(memory, zero_stage=stage), adapted=adapted
            )
    for stage, adapted in ((0, False), (3, False), (3, True)):
        facts[f"parallel_zero{stage}{'_lora' if adapted else ''}"] = parallel_facts(
            folder, prompts, role, replace(memory, zero_stage=stage), adapted=adapted
        )
    third = replace(memory, zero_stage=3)
    facts["prefetched"] = prefetch_facts(folder, prompts, role, third)
    facts["padded"] = padding_facts(role, third)
    facts["gate"] = gate_facts(folder, prompts, config)
    facts["stops"] = stop_facts(folder, prompts, role, replace(memory, zero_stage=3))
    facts["fallback"] = fallback_facts(folder, prompts, role, replace(memory, zero_stage=3))
    facts["room"] = room_facts(folder, prompts, role, replace(memory, zero_stage=3))
    for stage in (1, 3):
        facts[f"neighbours_zero{stage}"] = neighbour_facts(folder, prompts, role, replace(memory, zero_stage=stage))
    return facts
