"""Weights of a ZeRO-3 policy made whole: sent between the ranks, or through memory that they share."""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import pytest
import torch
from engines import SINGLE, prompts_for, zero
from generators import GREEDY, answers, are_alike, are_partitioned, generator_of, plain_engine, tokens, weights
from torch import Tensor

from rlhf.engine import build, generation, shared
from rlhf.engine.distributed import rank, world_size
from rlhf.engine.generation import whole_parameters
from rlhf.engine.shared import shared_memory
from rlhf.launcher import ds_config
from rlhf.launcher.ds_config import deepspeed_config
from rlhf.models.tokenizer import load_tokenizer


@contextmanager
def shared_from(least: int) -> Iterator[None]:
    """Weights of so many bytes go through shared memory, also where a machine's processors have memory of their own."""
    with patch.object(generation, "SHARED", least), patch.object(shared, "NODES", Path("none")):
        yield


def shared_mappings() -> int:
    """Mappings of shared memory files in this process."""
    return sum("/memfd:" in line for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines())


def late_shared_memory(count: int) -> Tensor | None:
    """Memory into which the second rank writes later than the first one."""
    memory = shared_memory(count)
    time.sleep(0.3 * rank())
    return memory


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.ranks(2)
def test_they_are_alike_however_many_are_gathered_at_once(folder: Path, adapted: bool) -> None:
    engine = plain_engine(folder, zero(3), adapted=adapted)
    before = weights(engine)
    for together in (1, 20_000):  # Bytes: each parameter alone, and some of them at once.
        with patch.object(generation, "TOGETHER", together):
            assert are_alike(before, weights(engine))


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.ranks(2)
def test_ranks_write_them_into_memory_that_they_share(folder: Path, adapted: bool) -> None:
    engine = plain_engine(folder, zero(3), adapted=adapted)
    before, prompts = weights(engine), prompts_for(load_tokenizer(folder / "policy"))
    sent = tokens(answers(engine, prompts, folder, GREEDY))
    with shared_from(1):
        with patch.object(generation, "shared_memory", late_shared_memory), whole_parameters(engine, engine.module):
            assert shared_mappings() == 1
            assert are_alike(before, list(engine.module.parameters()))
            for part in (engine.module, list(engine.module.children())[-1]):  # On every rank, before it gathers.
                with pytest.raises(RuntimeError, match="cannot be nested"), whole_parameters(engine, part):
                    pass
        assert are_partitioned(engine.module)
        generator = generator_of(engine, folder, GREEDY)
        with generator.generation_mode():
            kept = shared_mappings()
            assert tokens(generator.generate(prompts)) == sent
        # What adapters are merged into replaces what they share, and so does a copy for torch's operations.
        assert (kept > 0) == (shutil.which("g++") is not None and not adapted)
        assert shared_mappings() == 0
        # A rank that cannot open the other's file.
        with patch.object(shared, "_mapped", shared._mapped if rank() == 0 else lambda *file: None):
            assert are_alike(before, weights(engine))
    assert are_partitioned(engine.module)


def with_small_buckets(*arguments: Any, **options: Any) -> dict[str, Any]:
    """DeepSpeed's configuration, with which little is prefetched and kept."""
    config = ds_config.deepspeed_config(*arguments, **options)
    config["zero_optimization"] |= {
        "stage3_param_persistence_threshold": 40,
        "stage3_prefetch_bucket_size": 3000,
        "stage3_max_live_parameters": 8000,
        "stage3_max_reuse_distance": 0,
    }
    return config


def prefetching(folder: Path) -> tuple[Any, Callable[[], Any]]:
    """An engine of which DeepSpeed has some weights whole and some on their way after a pass, and its forward pass."""
    with patch.object(build, "deepspeed_config", with_small_buckets):
        engine = plain_engine(folder, zero(3))
    prompts = prompts_for(load_tokenizer(folder / "policy"))
    ids, mask = prompts.prompt_ids[:1], prompts.prompt_mask[:1].long()
    return engine, lambda: engine(input_ids=ids, attention_mask=mask, labels=ids).loss


def trained(engine: Any, forward: Callable[[], Any]) -> None:
    """One step."""
    engine.backward(forward())
    engine.step()


def by_deepspeed(engine: Any) -> list[Tensor]:
    """All weights as DeepSpeed itself gathers them, when it keeps none whole."""
    engine.empty_partition_cache()
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return [parameter.detach().clone() for parameter in engine.module.parameters()]


@pytest.mark.parametrize("least", [2**60, 1], ids=["sent", "shared"])
@pytest.mark.ranks(2)
def test_they_are_right_after_a_pass_that_deepspeed_took_for_trainings(folder: Path, least: int) -> None:
    engine, forward = prefetching(folder)
    for _ in range(4):
        trained(engine, forward)
    with torch.no_grad():
        forward()
    assert len({parameter.ds_status for parameter in engine.module.parameters()}) == 3  # Partitioned, coming, whole.
    with shared_from(least):
        found = weights(engine)
    assert are_alike(found, by_deepspeed(engine))


@pytest.mark.ranks(2)
def test_they_are_right_after_a_pass_that_ended_in_the_middle_and_training_goes_on(folder: Path) -> None:
    engine, forward = prefetching(folder)
    for _ in range(4):
        trained(engine, forward)
    part = next(part for part in engine.module.modules() if isinstance(part, torch.nn.Linear))
    with patch.object(type(part), "forward", side_effect=KeyError), suppress(KeyError):
        forward()
    with ExitStack() as within:
        within.enter_context(shared_from(1))
        within.enter_context(whole_parameters(engine, engine.module))
        found = [parameter.detach().clone() for parameter in engine.module.parameters()]
        read = part.weight.detach().clone()  # As a module reads it, of which DeepSpeed takes notice.
    assert are_alike(found, by_deepspeed(engine))
    with deepspeed.zero.GatheredParameters([part.weight]):
        assert torch.equal(read, part.weight)
    trained(engine, forward)


@pytest.mark.ranks(2)
def test_shards_may_end_in_padding_or_be_nothing_else() -> None:
    with deepspeed.zero.Init(config_dict_or_path=deepspeed_config(SINGLE, memory=zero(3), ranks=world_size())):
        module = torch.nn.ModuleList([torch.nn.Linear(3, 7), torch.nn.Linear(1, 1), torch.nn.LayerNorm(5)])
    parameters: list[Any] = list(module.parameters())
    with deepspeed.zero.GatheredParameters(parameters):
        wanted = [parameter.detach().clone() for parameter in parameters]
    with shared_from(1):
        with pytest.raises(KeyError), generation._shared(parameters):
            assert are_alike(wanted, parameters) and shared_mappings() == 1
            raise KeyError
        assert shared_mappings() == 0
    assert are_partitioned(module)
