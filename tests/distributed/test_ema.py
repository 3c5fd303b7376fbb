"""The sharded average of the weights against one of whole weights, computed in the plainest way after every step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param
from engines import ROLE, STAGES, exported, fixed_batch, largest_difference, loss_of, policy_engine, share_of, zero
from torch import Tensor

from rlhf.config.schema import Precision
from rlhf.engine.build import DTYPES
from rlhf.engine.distributed import all_reduce_sum
from rlhf.engine.ema import WeightAverage
from rlhf.engine.update import Objective, optimizer_step
from rlhf.models.tokenizer import load_tokenizer

DECAY, START = 0.7, 1
# The model is written in its own format: in bf16 two averages that differ in fp32's last bit may round apart.
ERROR = {Precision.fp32: 1e-6, Precision.bf16: 4e-3, Precision.fp16: 1e-3}


def masters(engine: Any) -> dict[str, Tensor]:
    """The whole fp32 weights, by DeepSpeed's own reading of them where it has one."""
    copied_groups = getattr(engine.optimizer, "fp32_groups", [])
    groups = zip(engine.optimizer.fp16_groups if copied_groups else [], copied_groups, strict=True)
    copies = {id(own): copy for group, copied in groups for own, copy in zip(group, copied, strict=True)}
    found = {}
    for name, parameter in engine.module.named_parameters():
        whole = copies.get(id(parameter), safe_get_full_fp32_param(parameter))
        found[name] = (parameter if whole is None else whole).detach().clone()
    return found


def check_average(folder: Path, to: Path, stage: int, precision: Precision) -> None:
    """Four steps, the first of which is not averaged yet."""
    tokenizer = load_tokenizer(folder / "policy")
    batch = fixed_batch(tokenizer)
    model, engine = policy_engine(folder, zero(stage, precision))
    average, plain = WeightAverage(engine, decay=DECAY, start_step=START), masters(engine)
    for step in range(1, 5):
        parts = share_of(batch).split(ROLE.micro_batch_size_per_gpu)
        optimizer_step(engine, Objective(micro_batches=parts, loss_sum=loss_of(engine, tokenizer), num_targets=100.0))
        average.update()
        now = masters(engine)
        plain = now if step <= START else {name: DECAY * old + (1 - DECAY) * now[name] for name, old in plain.items()}

    def logits() -> Tensor:
        mine = share_of(batch)
        with torch.no_grad():
            found: Tensor = engine(input_ids=mine.sequence_ids, attention_mask=mine.attention_mask).logits
        return found.float().clone()

    trained, before = exported(engine, model, tokenizer, to / "own"), logits()
    with average.in_place():
        assert float((logits() - before).abs().max()) > 1e-3
        written = exported(engine, model, tokenizer, to / "average")
    assert torch.equal(logits(), before)
    with pytest.raises(KeyError), average.in_place():
        raise KeyError
    assert torch.equal(logits(), before)
    rounded = {name: value.to(DTYPES[precision]).float() for name, value in plain.items()}
    assert largest_difference(rounded, written) <= ERROR[precision]
    assert largest_difference(plain, trained) > 1e-2  # Or the weights themselves would pass.
    check_size(engine, average, numel=sum(value.numel() for value in plain.values()))


def check_size(engine: Any, average: WeightAverage, *, numel: int) -> None:
    """Each rank keeps its share of the average, four bytes a parameter, and takes it from a checkpoint."""
    everywhere = float(all_reduce_sum(torch.tensor(float(average.num_bytes))))
    assert everywhere / numel == pytest.approx(4.0)
    assert 0.3 < average.num_bytes / (4 * numel) < 0.7
    resumed = WeightAverage(engine, decay=DECAY)
    resumed.load_state_dict(average.state_dict())
    assert (resumed.steps, resumed.num_bytes) == (4, average.num_bytes)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.ranks(2)
def test_it_is_that_of_the_whole_weights(folder: Path, tmp_path: Path, stage: int) -> None:
    check_average(folder, tmp_path, stage, Precision.fp32)


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.ranks(2)
def test_bf16_averages_the_fp32_weights(folder: Path, tmp_path: Path, stage: int) -> None:
    check_average(folder, tmp_path, stage, Precision.bf16)


@pytest.mark.skipif(not get_accelerator().is_fp16_supported(), reason="this processor does not compute in fp16")
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.ranks(2)
def test_fp16_averages_the_fp32_weights(folder: Path, tmp_path: Path, stage: int) -> None:
    check_average(folder, tmp_path, stage, Precision.fp16)
