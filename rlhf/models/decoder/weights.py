"""A decoder's weights for generation: as they are, or copied with adapters merged, packed, or cut for several ranks."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.activations import ACT2FN

from rlhf.models.decoder.parts import DecoderParts, LayerParts, Shape, UnsupportedModelError

# Activations that oneDNN applies to what a multiplication returns: its name for them, and its algorithm.
_FUSED = {"relu": ("relu", ""), "silu": ("swish", ""), "gelu": ("gelu", "none"), "gelu_pytorch_tanh": ("gelu", "tanh")}
Gather = Callable[[nn.Module], AbstractContextManager[None]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """Which of `ranks` equal parts of the heads and of the MLP this process computes."""

    rank: int = 0
    ranks: int = 1

    def of(self, tensor: Tensor, dim: int) -> Tensor:
        """This process's part of a tensor."""
        return tensor.chunk(self.ranks, dim=dim)[self.rank] if self.ranks > 1 else tensor


class Projection:
    """x W^T + b. On a CPU a bf16 weight is packed as oneDNN likes it, which is faster for small batches."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, rows: int) -> None:
        self.features = weight.shape[0]
        self.bias = bias
        self.packed = _packs(weight)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows) if self.packed else weight

    def __call__(
        self, x: Tensor, *, activation: str | None = None, add: Tensor | None = None, times: Tensor | None = None
    ) -> Tensor:
        """[N, in] to [N, out]: activation(x W^T + b), or with something added to or multiplied by it."""
        if not self.packed:
            y = F.linear(x, self.weight, self.bias)
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
        self.weight: Tensor = _kept(module.weight, own)
        self.bias: Tensor | None = _kept(getattr(module, "bias", None), own) if centred else None
        self.centred = centred

    def __call__(self, x: Tensor) -> Tensor:
        """[..., d] to [..., d]."""
        shape = (x.shape[-1],)
        if self.centred:
            return F.layer_norm(x, shape, self.weight, self.bias, self.epsilon)
        return F.rms_norm(x, shape, self.weight, self.epsilon)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerWeights:
    """The weights of one block."""

    attention_norm: Norm
    qkv: Projection | Apart
    query_norm: Norm | None
    key_norm: Norm | None
    out: Projection
    mlp_norm: Norm
    gate: Projection | None
    up: Projection
    down: Projection


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderWeights:
    """The weights of a decoder; of its heads and of its MLPs this process may have a part only."""

    shape: Shape
    share: Share
    embedding: Tensor
    positions: Tensor | None
    embedding_norm: Norm | None
    project_in: Projection | None
    project_out: Projection | None
    final_norm: Norm | None
    head: Projection
    layers: tuple[LayerWeights, ...]

    @property
    def heads(self) -> int:
        """The heads of queries that this process computes."""
        return self.shape.heads // self.share.ranks

    @property
    def kv_heads(self) -> int:
        """The heads of keys and values that this process computes."""
        return self.shape.kv_heads // self.share.ranks

    @property
    def dtype(self) -> torch.dtype:
        """The format of the arithmetic."""
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.device


@torch.no_grad()
def generation_weights(
    parts: DecoderParts, *, vocab_limit: int, rows: int, gather: Gather, own: bool, share: Share | None = None
) -> DecoderWeights:
    """A model's weights as they are now, for generation.

    Args:
        parts: the model's parts.
        vocab_limit: logits from here on are padding: their rows of the output layer are left out.
        rows: tokens that are decoded together as a rule, for which the weights are packed.
        gather: a context in which a module's parameters are whole; entered for one block after the other.
        own: copy the weights, as those need that are whole within `gather` only; otherwise those that neither adapters
            nor packing change are the model's own.
        share: what of the heads, which the ranks divide, and of the MLPs this process computes, in a copy; all if not
            given.
    """
    share = share or Share()
    reader = _Reader(shape=parts.shape, share=share, rows=rows, own=own or share.ranks > 1)
    layers = []
    for layer in parts.layers:
        with gather(layer.module):
            layers.append(reader.layer(layer))
    with gather(nn.ModuleList(parts.outer())):
        embedding = _kept(dense(parts.embedding)[0], reader.own)
        head, head_bias = dense(parts.head)
        head_bias = None if head_bias is None else head_bias[:vocab_limit]
        if head is dense(parts.embedding)[0]:  # Tied: one copy for both.
            output = Projection(embedding[:vocab_limit], _kept(head_bias, reader.own), rows=rows)
        else:
            output = reader.projection(head[:vocab_limit], head_bias)
        return DecoderWeights(
            shape=parts.shape,
            share=share,
            embedding=embedding,
            positions=_kept(dense(parts.positions)[0], reader.own) if parts.positions is not None else None,
            embedding_norm=reader.norm(parts.embedding_norm),
            project_in=reader.whole(parts.project_in),
            project_out=reader.whole(parts.project_out),
            final_norm=reader.norm(parts.final_norm),
            head=output,
            layers=tuple(layers),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Reader:
    """From modules whose parameters are whole to weights."""

    shape: Shape
    share: Share
    rows: int
    own: bool

    def projection(self, weight: Tensor, bias: Tensor | None) -> Projection:
        return Projection(_kept(weight, self.own), _kept(bias, self.own), rows=self.rows)

    def whole(self, module: nn.Module | None) -> Projection | None:
        return self.projection(*dense(module)) if module is not None else None

    def norm(self, module: nn.Module | None) -> Norm | None:
        return Norm(module, own=self.own) if module is not None else None

    def by_rows(self, weights: list[tuple[Tensor, Tensor | None]]) -> Projection:
        """Projections whose outputs are divided, joined."""
        biases = [self.share.of(bias, 0) for _, bias in weights if bias is not None]
        if len(weights) == 1:
            return self.projection(self.share.of(weights[0][0], 0), biases[0] if biases else None)
        joint = torch.cat([self.share.of(weight, 0) for weight, _ in weights])
        return Projection(joint, torch.cat(biases) if biases else None, rows=self.rows)

    def by_columns(self, module: nn.Module) -> Projection:
        """A projection whose inputs are divided; the bias is added once."""
        weight, bias = dense(module)
        return self.projection(self.share.of(weight, 1), bias if self.share.rank == 0 else None)

    def qkv(self, modules: tuple[nn.Module, ...]) -> Projection | Apart:
        weights = [dense(module) for module in modules]
        if not self.own and not _packs(weights[0][0]):
            apart = tuple(self.projection(*each) for each in weights)
            return Apart(apart, per_head=self.shape.heads if self.shape.per_head else None)
        return self.by_rows(_by_role(weights[0], self.shape) if self.shape.per_head else weights)

    def layer(self, parts: LayerParts) -> LayerWeights:
        gate, up = parts.up if self.shape.gated else (None, parts.up[0])
        return LayerWeights(
            attention_norm=Norm(parts.attention_norm, own=self.own),
            qkv=self.qkv(parts.qkv),
            query_norm=self.norm(parts.query_norm),
            key_norm=self.norm(parts.key_norm),
            out=self.by_columns(parts.out),
            mlp_norm=Norm(parts.mlp_norm, own=self.own),
            gate=self.by_rows([dense(gate)]) if gate is not None else None,
            up=self.by_rows([dense(up)]),
            down=self.by_columns(parts.down),
        )


def _by_role(joint: tuple[Tensor, Tensor | None], shape: Shape) -> list[tuple[Tensor, Tensor | None]]:
    """A joint projection's rows, ordered head by head, as those of queries, keys and values."""
    weight, bias = joint
    weights = weight.view(shape.heads, 3, shape.head_dim, -1).unbind(1)
    biases = bias.view(shape.heads, 3, shape.head_dim).unbind(1) if bias is not None else (None, None, None)
    return [
        (part.flatten(0, 1), None if own is None else own.flatten()) for part, own in zip(weights, biases, strict=True)
    ]


def dense(module: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a linear layer or an embedding; adapters that are on are added up in fp32."""
    if not isinstance(module, BaseTunerLayer):
        return module.weight, getattr(module, "bias", None)
    base: Any = module.get_base_layer()
    weight: Tensor = base.weight
    assert isinstance(module, LoraLayer), "decoder_parts lets no others pass"
    if not module.disable_adapters:
        merged = weight.float()
        for name in module.active_adapters:
            down: Any = module.lora_A[name].weight
            up: Any = module.lora_B[name].weight
            merged = merged + module.scaling[name] * (up.float() @ down.float())
        weight = merged.to(weight.dtype)
    return weight, base.bias


@torch.no_grad()
def plain_weights(model: nn.Module, *, gather: Gather, own: bool) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the plain model that computes what this one does, by the names that transformers gives them.

    Adapters that are on are merged; tied weights come under each of their names. One module is gathered after the
    other: every rank must go through all of them. `own` gives copies, which stay after the next weight was asked for.
    """
    adapted: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in adapted):
            continue
        if isinstance(module, BaseTunerLayer):
            adapted.append(name)
            layer: Any = module
            with gather(layer):
                weight, bias = dense(layer)
                found = {"weight": weight, "bias": bias}
                yield from (
                    (f"{name}.{part}", _kept(own_part, own)) for part, own_part in found.items() if own_part is not None
                )
        elif any(parameter is not None for parameter in module._parameters.values()):
            with gather(module):
                for part, parameter in module._parameters.items():
                    if parameter is not None:
                        yield f"{name}.{part}", _kept(parameter, own)


def needs_copy(parts: DecoderParts) -> bool:
    """Whether generation takes a copy of the weights even where they are whole: adapters are merged, or it packs."""
    modules = parts.dense()
    return any(isinstance(module, BaseTunerLayer) for module in modules) or _packs(dense(modules[-1])[0])


@cache
def _activation(name: str) -> Any:
    return ACT2FN[name]


def _kept(tensor: Any, own: bool) -> Any:
    """A tensor as it is, or a copy that nobody else changes."""
    if tensor is None:
        return None
    return tensor.detach().clone(memory_format=torch.contiguous_format) if own else tensor.detach()


def _packs(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and _can_pack()


def _can_pack() -> bool:
    return bool(torch._C._has_mkldnn) and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
