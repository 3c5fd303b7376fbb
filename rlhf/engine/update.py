"""One optimizer step over micro-batches, normalised by the global number of targets."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from rlhf.engine.distributed import world_size

MicroBatch = TypeVar("MicroBatch")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What came of an optimizer step on this rank."""

    loss_sum: Tensor
    grad_norm: float
    learning_rate: float
    applied: bool


def optimizer_step(
    engine: Any,
    micro_batches: Sequence[MicroBatch],
    loss_sum: Callable[[MicroBatch], Tensor],
    *,
    num_targets: float,
) -> StepResult:
    """Accumulate the gradients of a summed loss over the micro-batches and step once.

    The gradient of the step is d(sum of all ranks' and micro-batches' losses)/d(weights) / num_targets, however the
    batch is cut: each micro-batch's sum is scaled by world_size * accumulation_steps / num_targets, which undoes
    DeepSpeed's mean over ranks and over accumulation steps.

    Args:
        engine: a DeepSpeed engine with an optimizer.
        micro_batches: as many as the engine accumulates; the same number on every rank.
        loss_sum: the summed loss of a micro-batch, a scalar with gradient.
        num_targets: global number of tokens (or pairs) that the losses sum over.

    Returns:
        This rank's loss sum (on the device), the global gradient norm before clipping, the learning rate used, and
        whether the step was applied (DeepSpeed skips steps with non-finite gradients).
    """
    accumulation_steps = engine.gradient_accumulation_steps()
    assert len(micro_batches) == accumulation_steps, "the micro-batches must fill exactly one optimizer step"
    scale = world_size() * accumulation_steps / max(num_targets, 1.0)
    learning_rate = float(engine.get_lr()[0])
    total = torch.zeros((), device=engine.device)
    own_norm: float | None = None
    for index, micro_batch in enumerate(micro_batches):
        loss = loss_sum(micro_batch)
        engine.backward(loss * scale)
        if index == accumulation_steps - 1 and _steps_unguarded(engine):
            own_norm = _own_norm(engine)
        if own_norm is None or math.isfinite(own_norm):
            engine.step()
        else:
            _skip(engine)
        total = total + loss.detach().float()
    norm = engine.get_global_grad_norm() if own_norm is None else own_norm
    return StepResult(
        loss_sum=total,
        grad_norm=float(norm) if norm is not None else math.nan,
        learning_rate=learning_rate,
        applied=(own_norm is None or math.isfinite(own_norm)) and bool(engine.was_step_applied()),
    )


def _steps_unguarded(engine: Any) -> bool:
    """Whether DeepSpeed neither measures the gradient nor skips a step whose gradient is not finite: fp32, ZeRO-0."""
    return engine.zero_optimization_stage() == 0 and not engine.fp16_enabled() and not engine.bfloat16_enabled()


def _own_norm(engine: Any) -> float:
    """The norm of the reduced gradients of all parameters."""
    gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def _skip(engine: Any) -> None:
    """Let an accumulation boundary pass without a step, as DeepSpeed's other optimizers do."""
    engine.optimizer.zero_grad()
    engine.micro_steps += 1
    engine.skipped_steps += 1
