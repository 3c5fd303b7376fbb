"""Optimizer steps of real engines: the same whatever divides the work, and what is mixed, skipped or refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from engines import (
    ROLE,
    SINGLE,
    STAGES,
    exported,
    fixed_batch,
    largest_difference,
    loss_of,
    policy_engine,
    share_of,
    targets_of,
    zero,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf.batch import SFTBatch
from rlhf.config.errors import ConfigError
from rlhf.config.schema import MemoryConfig, Precision
from rlhf.engine.build import scheduler_factory
from rlhf.engine.distributed import gather_objects, world_size
from rlhf.engine.update import Objective, StepResult, optimizer_step
from rlhf.functional.masking import position_ids
from rlhf.models.load import load_causal_lm
from rlhf.models.tokenizer import load_tokenizer
from rlhf.rollout.forward import next_token_loss

OFFLOADED = MemoryConfig(zero_stage=3, precision=Precision.fp32, offload_optimizer=True, offload_parameters=True)
computes_fp16 = pytest.mark.skipif(
    not get_accelerator().is_fp16_supported(), reason="this processor does not compute in fp16"
)


def start_of(folder: Path) -> dict[str, Tensor]:
    """The weights before training."""
    weights: dict[str, Tensor] = AutoModelForCausalLM.from_pretrained(
        folder / "policy", dtype=torch.float32
    ).state_dict()
    return weights


def by_torch(folder: Path, steps: int = 3) -> dict[str, Tensor]:
    """The weights after a few steps on the whole batch by torch's AdamW and schedule, in one process."""
    tokenizer = load_tokenizer(folder / "policy")
    model = load_causal_lm(folder / "policy", tokenizer, dtype=torch.float32, attention="eager")
    batch, own = fixed_batch(tokenizer), ROLE.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=own.learning_rate, betas=tuple(own.betas), eps=own.eps, weight_decay=own.weight_decay
    )
    schedule = scheduler_factory(own, total_steps=steps)(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        (next_token_loss(model, batch, vocab_limit=len(tokenizer)) / targets_of(batch)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), own.max_grad_norm)
        optimizer.step()
        schedule.step()
    return {name: value.detach() for name, value in model.state_dict().items()}


def by_engine(folder: Path, to: Path, memory: MemoryConfig, *, micro: int, steps: int = 3) -> dict[str, Tensor]:
    """The exported weights after as many steps of an engine, whose ranks share the batch."""
    tokenizer = load_tokenizer(folder / "policy")
    batch = fixed_batch(tokenizer)
    model, engine = policy_engine(folder, memory, replace(ROLE, micro_batch_size_per_gpu=micro), steps=steps)
    for _ in range(steps):
        parts, loss = share_of(batch).split(micro), loss_of(engine, tokenizer)
        optimizer_step(engine, Objective(micro_batches=parts, loss_sum=loss, num_targets=targets_of(batch)))
    return exported(engine, model, tokenizer, to)


@pytest.mark.parametrize(("stage", "micro"), [(0, 1), (0, 2), (0, 4), (1, 2), (2, 2), (3, 2)])
@pytest.mark.ranks(2)
def test_micro_batches_accumulation_and_zero_stages_give_the_update_of_plain_torch(
    folder: Path, tmp_path: Path, stage: int, micro: int
) -> None:
    plain = by_torch(folder)
    assert largest_difference(plain, start_of(folder)) > 1e-2  # Three steps of 1e-2.
    weights = by_engine(folder, tmp_path, zero(stage), micro=micro)
    assert largest_difference(weights, plain) < 2e-5
    ours, others = gather_objects(weights)
    assert all(torch.equal(value, others[name]) for name, value in ours.items())


@pytest.mark.ranks(1)
def test_one_rank_gives_the_update_of_plain_torch(folder: Path, tmp_path: Path) -> None:
    assert world_size() == 1
    assert largest_difference(by_engine(folder, tmp_path, zero(0), micro=2), by_torch(folder)) < 2e-5


@pytest.mark.ranks(2)
def test_states_in_the_hosts_memory_change_nothing(folder: Path, tmp_path: Path) -> None:
    assert largest_difference(by_engine(folder, tmp_path, OFFLOADED, micro=2), by_torch(folder)) < 2e-5


def plain_norms(folder: Path, batch: SFTBatch, num_targets: tuple[float, float]) -> list[float]:
    """Norms of the gradients of the first and the second half of all ranks' rows, computed in one process."""
    tokenizer = load_tokenizer(folder / "policy")
    share = len(batch) // world_size()
    norms = []
    for half, targets in enumerate(num_targets):
        model = load_causal_lm(folder / "policy", tokenizer, dtype=torch.float32, attention="eager")
        for start in range(half * share // 2, len(batch), share):
            rows = batch.rows(slice(start, start + share // 2))
            (next_token_loss(model, rows, vocab_limit=len(tokenizer)) / targets).backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))
    return norms


def stepped(folder: Path, to: Path, memory: MemoryConfig, *, mixed: bool) -> tuple[dict[str, Tensor], StepResult]:
    """Two steps of one objective over eight rows, or of two over four rows each: half the targets, half the weight."""
    tokenizer = load_tokenizer(folder / "policy")
    batch = fixed_batch(tokenizer)
    model, engine = policy_engine(folder, memory, SINGLE)
    parts, loss, targets = share_of(batch).split(1), loss_of(engine, tokenizer), targets_of(batch)
    half = len(parts) // 2
    whole = [Objective(micro_batches=parts, loss_sum=loss, num_targets=targets)]
    halves = [
        Objective(micro_batches=parts[:half], loss_sum=loss, num_targets=targets),
        Objective(micro_batches=parts[half:], loss_sum=loss, num_targets=targets / 2, weight=0.5),
    ]
    steps = [optimizer_step(engine, *(halves if mixed else whole)) for _ in range(2)]
    optimizer_step(engine, *whole)  # Afterwards the engine accumulates as ever.
    return exported(engine, model, tokenizer, to), steps[0]


def check_mixing(folder: Path, to: Path, memory: MemoryConfig, *, weights: float, norms: float) -> None:
    """Objectives are added by their weights, and their gradients' norms are those of one process."""
    whole, _ = stepped(folder, to / "whole", memory, mixed=False)
    halves, first = stepped(folder, to / "halves", memory, mixed=True)
    assert largest_difference(whole, halves) < weights
    batch = fixed_batch(load_tokenizer(folder / "policy"))
    plain = plain_norms(folder, batch, (targets_of(batch), targets_of(batch) / 2))
    assert first.own_norms == pytest.approx(plain, rel=norms)
    assert abs(plain[0] / plain[1] - 1) > 0.1  # Or they could be mistaken for one another.


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.ranks(2)
def test_objectives_are_added_by_their_weights_and_measured_apart(folder: Path, tmp_path: Path, stage: int) -> None:
    check_mixing(folder, tmp_path, zero(stage), weights=2e-5, norms=1e-4)


@pytest.mark.ranks(2)
def test_objectives_are_added_and_measured_where_states_are_in_the_hosts_memory(folder: Path, tmp_path: Path) -> None:
    check_mixing(folder, tmp_path, replace(zero(3), offload_optimizer=True), weights=2e-5, norms=1e-4)


@computes_fp16
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.ranks(2)
def test_fp16_scales_its_loss_and_gives_nearly_the_same(folder: Path, tmp_path: Path, stage: int) -> None:
    # The norms are those without the scale, as in fp32.
    check_mixing(folder, tmp_path, zero(stage, Precision.fp16), weights=2e-2, norms=2e-3)


@pytest.mark.ranks(2)
def test_fp16_without_zero_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not scale the loss of fp16: use memory\.zero_stage=1 or more"):
        policy_engine(folder, zero(0, Precision.fp16))


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.ranks(2)
def test_a_gradient_that_is_not_finite_moves_no_weight(folder: Path, stage: int) -> None:
    tokenizer = load_tokenizer(folder / "policy")
    _, engine = policy_engine(folder, zero(stage), replace(SINGLE, batch_size=world_size()))
    before = [parameter.detach().clone() for parameter in engine.module.parameters()]
    rows = [fixed_batch(tokenizer).rows(slice(0, 1))]
    loss = loss_of(engine, tokenizer)
    result = optimizer_step(
        engine, Objective(micro_batches=rows, loss_sum=lambda part: loss(part) * float("nan"), num_targets=1.0)
    )
    assert not result.applied
    assert all(torch.equal(old, new) for old, new in zip(before, engine.module.parameters(), strict=True))


def test_padding_does_not_change_logits(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "policy")
    model: Any = load_causal_lm(folder / "policy", tokenizer, dtype=torch.float32, attention="sdpa").eval()
    ids = torch.randint(6, len(tokenizer), (4, 6), generator=torch.Generator().manual_seed(3))
    mask = torch.arange(6) >= torch.tensor([0, 2, 4, 1]).unsqueeze(1)
    padded = torch.where(mask, ids, tokenizer.pad_token_id)
    with torch.no_grad():
        logits = model(input_ids=padded, attention_mask=mask, position_ids=position_ids(mask)).logits
        for row, real, found in zip(padded, mask, logits, strict=True):
            torch.testing.assert_close(
                model(input_ids=row[real].unsqueeze(0)).logits[0], found[real], atol=1e-5, rtol=0
            )
