"""One optimizer step over micro-batches, normalised by the global number of targets."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from rlhf.engine.distributed import world_size
from rlhf.engine.shards import GradientShares

MicroBatch = TypeVar("MicroBatch")


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective(Generic[MicroBatch]):
    """One term of an optimizer step: a summed loss over micro-batches, its number of targets, and its weight.

    `loss_sum` gives the summed loss of a micro-batch, a scalar with gradient; `num_targets` is the number of tokens (or
    pairs) that the sums of all ranks are over.
    """

    micro_batches: Sequence[MicroBatch]
    loss_sum: Callable[[MicroBatch], Tensor]
    num_targets: float
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What came of an optimizer step on this rank: each objective's loss sum, and what DeepSpeed did.

    `own_norms` are the norms of two objectives' gradients, each without its weight; empty where they were not measured.
    """

    loss_sums: tuple[Tensor, ...]
    own_norms: tuple[float, ...]
    grad_norm: float
    learning_rate: float
    applied: bool
    loss_scale: float | None

    @property
    def loss_sum(self) -> Tensor:
        """The first objective's."""
        return self.loss_sums[0]


def optimizer_step(engine: Any, *objectives: Objective[Any]) -> StepResult:
    """Accumulate the gradients of all objectives over their micro-batches and step once.

    The gradient of the step is the sum over the objectives of weight * d(sum of all ranks' and micro-batches'
    losses)/d(weights) / num_targets, however the batches are cut: each micro-batch's sum is scaled by weight *
    world_size * accumulation_steps / num_targets, which undoes DeepSpeed's mean over ranks and accumulation steps.
    Two objectives' gradients are measured apart, except under ZeRO-1 and 2 with their optimizer on the host.

    Args:
        engine: a DeepSpeed engine with an optimizer.
        objectives: together they have as many micro-batches as the engine accumulates, on every rank.

    Returns:
        This rank's loss sums (on the device), the global gradient norm before clipping, the learning rate used, whether
        the step was applied (DeepSpeed skips steps with non-finite gradients), and fp16's loss scale.
    """
    accumulation_steps = engine.gradient_accumulation_steps()
    parts = [(index, part) for index, objective in enumerate(objectives) for part in objective.micro_batches]
    assert len(parts) == accumulation_steps, "the micro-batches must fill exactly one optimizer step"
    learning_rate = float(engine.get_lr()[0])
    totals = [torch.zeros((), device=engine.device) for _ in objectives]
    apart = _Apart(engine, objectives) if len(objectives) == 2 and GradientShares.readable(engine) else None
    own_norm: float | None = None
    try:
        for number, (index, part) in enumerate(parts):
            objective = objectives[index]
            if apart is not None:
                apart.before_backward(number)
            loss = objective.loss_sum(part)
            scale = objective.weight * world_size() * accumulation_steps / max(objective.num_targets, 1.0)
            engine.backward(loss * scale)
            if apart is not None:
                apart.after_backward(number)
            if number == accumulation_steps - 1 and _steps_unguarded(engine):
                own_norm = _own_norm(engine)
            if own_norm is None or math.isfinite(own_norm):
                engine.step()
            else:
                _skip(engine)
            totals[index] = totals[index] + loss.detach().float()
    finally:
        if apart is not None:
            apart.end()
    norm = engine.get_global_grad_norm() if own_norm is None else own_norm
    return StepResult(
        loss_sums=tuple(totals),
        own_norms=apart.norms if apart is not None else (),
        grad_norm=float(norm) if norm is not None else math.nan,
        learning_rate=learning_rate,
        applied=(own_norm is None or math.isfinite(own_norm)) and bool(engine.was_step_applied()),
        loss_scale=float(engine.optimizer.loss_scale) if engine.fp16_enabled() else None,
    )


class _Apart:
    """Reads the reduced gradient of the first of two objectives before the second one's is added to it.

    Meanwhile it keeps this rank's shares of the first one, in the format of the weights; in the host's memory if the
    optimizer is there.
    """

    def __init__(self, engine: Any, objectives: Sequence[Objective[Any]]) -> None:
        self._engine, self._shares = engine, GradientShares(engine)
        self._weights = [objective.weight for objective in objectives]
        self._ends = [len(objectives[0].micro_batches) - 1, sum(len(one.micro_batches) for one in objectives) - 1]
        self._first: list[Tensor] = []
        self.norms: tuple[float, ...] = ()

    def before_backward(self, number: int) -> None:
        """The gradients of an objective's last micro-batch are reduced as if a step came."""
        self._engine.set_gradient_accumulation_boundary(number in self._ends)

    def after_backward(self, number: int) -> None:
        """Measure at the end of an objective; the gradient of a step is the sum of both."""
        if number == self._ends[0]:
            place = "cpu" if self._engine.zero_cpu_offload() else self._engine.device
            # ZeRO-3 gives fp32 copies of what it holds in the weights' format.
            dtype = next(self._engine.module.parameters()).dtype if self._shares.accumulates else None
            self._first = [share.to(place, dtype, copy=True) for share in self._shares.read()]
            self._note(self._shares.read(), self._weights[0])
            self._engine.set_gradient_accumulation_boundary(False)
        elif number == self._ends[1]:
            pairs = zip(self._shares.read(), self._first, strict=True)
            if self._shares.accumulates:
                self._note((share - first.to(share.device) for share, first in pairs), self._weights[1])
                return
            self._note(self._shares.read(), self._weights[1])
            for share, first in pairs:
                share.add_(first)

    def end(self) -> None:
        """Give the boundary back to DeepSpeed's own counting."""
        self._engine._is_gradient_accumulation_boundary = None

    def _note(self, shares: Iterable[Tensor], weight: float) -> None:
        norm = self._shares.norm(shares)
        self.norms = (*self.norms, norm / weight if weight else math.nan)


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
