"""The arithmetic of a decoder's layers: projections, packed or with adapters beside, and norms."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from rlhf.models.decoder.parts import UnsupportedModelError

# Activations that oneDNN applies to what a multiplication returns: its name for them, and its algorithm.
_FUSED = {"relu": ("relu", ""), "silu": ("swish", ""), "gelu": ("gelu", "none"), "gelu_pytorch_tanh": ("gelu", "tanh")}


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """What is added to a projection: scale * x down^T up^T (Hu et al. 2021). `down` is [rank, in], `up` [out, rank]."""

    down: Tensor
    up: Tensor
    scale: float


class Projection:
    """x W^T + b, and what adapters add that are not merged into W.

    Without these a bf16 weight is packed on a CPU as oneDNN likes it, which is faster for batches of about `rows`;
    None: the weight is left as it is.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, *, rows: int | None, adapters: tuple[Adapter, ...] = ()
    ) -> None:
        self.features = weight.shape[0]
        self.bias = bias
        self.adapters = tuple(
            replace(adapter, down=adapter.down.to(weight.dtype), up=adapter.up.to(weight.dtype)) for adapter in adapters
        )
        self.packed = rows is not None and not adapters and packs(weight)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows) if self.packed else weight

    def __call__(
        self, x: Tensor, *, activation: str | None = None, add: Tensor | None = None, times: Tensor | None = None
    ) -> Tensor:
        """[N, in] to [N, out]: activation(x W^T + b), or with something added to or multiplied by it."""
        if not self.packed:
            y = F.linear(x, self.weight, self.bias)
            for adapter in self.adapters:
                y = torch.addmm(y, F.linear(x, adapter.down), adapter.up.t(), alpha=adapter.scale)
            if activation is not None:
                y = _activation(activation)(y)
            return y + add if add is not None else y * times if times is not None else y
        multiply = torch.ops.mkldnn._linear_pointwise
        if add is not None or times is not None:
            other, how = (add, "add") if add is not None else (times, "mul")
            result: Tensor = multiply.binary(x, other, self.weight, self.bias, how)
        elif activation in _FUSED:
            name, algorithm = _FUSED[activation]
            result = multiply(x, self.weight, self.bias, name, [], algorithm)
        else:
            result = multiply(x, self.weight, self.bias, "none", [], "")
            result = _activation(activation)(result) if activation is not None else result
        return result


class Apart:
    """Queries, keys and values from weights that are left as they are: several projections, or one head by head."""

    def __init__(self, projections: tuple[Projection, ...], *, per_head: int | None) -> None:
        self.projections, self.per_head = projections, per_head

    def __call__(self, x: Tensor) -> Tensor:
        """[N, in] to [N, out]: all queries, then all keys, then all values."""
        parts = [projection(x) for projection in self.projections]
        if self.per_head is None:
            return torch.cat(parts, dim=1)
        return parts[0].view(len(x), self.per_head, 3, -1).transpose(1, 2).reshape(len(x), -1)


class Norm:
    """A layer norm or a root-mean-square norm."""

    def __init__(self, module: nn.Module, *, own: bool) -> None:
        centred = isinstance(module, nn.LayerNorm)
        epsilon: Any = getattr(module, "eps" if centred else "variance_epsilon", None)
        if epsilon is None:
            raise UnsupportedModelError(f"norms of class {type(module).__name__}")
        self.epsilon = float(epsilon)
        self.weight: Tensor = kept_tensor(module.weight, own)
        self.bias: Tensor | None = kept_tensor(getattr(module, "bias", None), own) if centred else None
        self.centred = centred

    def __call__(self, x: Tensor) -> Tensor:
        """[..., d] to [..., d]."""
        shape = (x.shape[-1],)
        if self.centred:
            return torch.layer_norm(x, shape, self.weight, self.bias, self.epsilon)
        if x.device.type != "cpu" or x.dtype == torch.float32:
            return F.rms_norm(x, shape, self.weight, self.epsilon)
        wide = x.float()  # torch's own is slow in bf16.
        squares = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_() / x.shape[-1]
        return wide.mul_(squares.add_(self.epsilon).rsqrt_()).to(x.dtype).mul_(self.weight)


@cache
def _activation(name: str) -> Any:
    return ACT2FN[name]


def kept_tensor(tensor: Any, own: bool) -> Any:
    """A tensor as it is, or a copy that nobody else changes."""
    if tensor is None:
        return None
    return tensor.detach().clone(memory_format=torch.contiguous_format) if own else tensor.detach()


def packs(weight: Tensor) -> bool:
    """Whether a weight is packed: bf16 on a CPU."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return False
    return bool(torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported())
