"""Which part of a parameter a rank answers for, and that part of its gradient, whatever the ZeRO stage."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from deepspeed.utils import safe_get_local_grad
from torch import Tensor

from rlhf.engine.distributed import all_reduce_sum, rank, world_size


def extent(parameter: Any) -> tuple[int, int]:
    """Offset and length of this rank's share of the flattened parameter; together the shares are the whole.

    Where DeepSpeed has whole parameters and gradients on every rank (ZeRO-0), a share is a slice of them.
    """
    if hasattr(parameter, "ds_id"):
        size = parameter.ds_tensor.numel()
        offset = rank() * size
        return offset, max(0, min(size, parameter.ds_numel - offset))
    if hasattr(parameter, "_hp_mapping"):
        if parameter._hp_mapping is None:  # Other ranks hold all of it.
            return 0, 0
        address = parameter._hp_mapping.lp_fragment_address
        return address.start, address.numel
    size = -(-parameter.numel() // world_size())
    offset = min(rank() * size, parameter.numel())
    return offset, min(size, parameter.numel() - offset)


class GradientShares:
    """This rank's shares of the reduced gradients of an engine's trained parameters.

    They can be read between the backward pass of an accumulation boundary and the step. Where a step has two boundaries
    one behind the other, ZeRO-1 and 2 then hold the gradients since the first, others the sum of all
    (measured with DeepSpeed 0.19): `accumulates` says which. What is left of a sum of 16-bit numbers has their
    precision: the smaller part's norm is off by 1 % where it is a hundredth of the other.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
        self.accumulates = engine.zero_optimization_stage() in (0, 3)

    @staticmethod
    def readable(engine: Any) -> bool:
        """Whether an engine can have two boundaries in a step: not ZeRO-1 or 2 with its optimizer on the host."""
        return not (engine.zero_optimization_stage() in (1, 2) and engine.zero_cpu_offload())

    def read(self) -> Iterator[Tensor]:
        """Each parameter's share, 1-D, one after the other: views of what the optimizer will step with.

        Under ZeRO-3 they may be copies, in fp32 and on the device wherever the optimizer is.
        """
        return (self._share(parameter) for parameter in self._parameters)

    def norm(self, shares: Iterable[Tensor]) -> float:
        """The Euclidean norm of all ranks' shares together, without fp16's loss scale. Every rank must call."""
        squares = torch.zeros((), dtype=torch.float64, device=self._engine.device)
        for share in shares:
            squares += share.float().square().sum(dtype=torch.float64)
        scale = float(self._engine.optimizer.loss_scale) if self._engine.fp16_enabled() else 1.0
        return math.sqrt(float(all_reduce_sum(squares))) / scale

    def _share(self, parameter: Any) -> Tensor:
        offset, numel = extent(parameter)
        if numel == 0:
            return torch.zeros(0, device=self._engine.device)
        if hasattr(parameter, "ds_id"):
            local: Tensor = safe_get_local_grad(parameter)
            return local.view(-1)[:numel]
        if hasattr(parameter, "_hp_mapping"):
            fragment: Tensor = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)
            return fragment.view(-1)
        if parameter.grad is None:
            return torch.zeros(numel, device=self._engine.device)
        gradient: Tensor = parameter.grad.view(-1)[offset : offset + numel]
        return gradient
