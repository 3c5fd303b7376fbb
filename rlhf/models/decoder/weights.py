"""A decoder's weights for generation: as they are, or copied with adapters merged, packed, or cut for several ranks."""

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from rlhf.models.decoder.layers import Adapter, Apart, Norm, Projection, kept_tensor, packs
from rlhf.models.decoder.parts import DecoderParts, LayerParts, Shape

Gather = Callable[[nn.Module], AbstractContextManager[None]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """Which of `ranks` equal parts of the heads and of the MLP this process computes."""

    rank: int = 0
    ranks: int = 1

    def of(self, tensor: Tensor, dim: int) -> Tensor:
        """This process's part of a tensor."""
        return tensor.chunk(self.ranks, dim=dim)[self.rank] if self.ranks > 1 else tensor


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

    def tensors(self) -> Iterator[Tensor]:
        """All weights, and what was derived from them."""
        yield from _tensors(self)


@torch.no_grad()
def generation_weights(
    parts: DecoderParts,
    *,
    vocab_limit: int,
    rows: int | None,
    gather: Gather,
    own: bool,
    share: Share | None = None,
    copy: bool = True,
    together: int = 1,
) -> DecoderWeights:
    """A model's weights as they are now, for generation.

    Args:
        parts: the model's parts.
        vocab_limit: logits from here on are padding: their rows of the output layer are left out.
        rows: tokens that are decoded together as a rule, for which the weights are packed; None: they are not packed.
        gather: a context in which a module's parameters are whole; entered for a few blocks after the other.
        own: copy the weights, so that what `gather` made whole is not kept, and join queries', keys' and values';
            otherwise those that neither adapters nor packing change are as they lie in the model within `gather`.
        share: what of the heads, which the ranks divide, and of the MLPs this process computes, in a copy; all if not
            given.
        copy: without it nothing is copied: neither packed nor joined, and adapters are computed apart. The parameters
            must be whole, and all of the heads this process's.
        together: blocks that are gathered at once.
    """
    share = share or Share()
    own = own or share.ranks > 1
    assert copy or not own, "what is gathered or cut is copied"
    reader = _Reader(shape=parts.shape, share=share, rows=rows if copy else None, own=own, copy=copy)
    layers: list[LayerWeights] = []
    for first in range(0, len(parts.layers), together):
        some = parts.layers[first : first + together]
        with gather(nn.ModuleList(layer.module for layer in some)):
            layers += map(reader.layer, some)
    with gather(nn.ModuleList(parts.outer())):
        embedding = kept_tensor(base(parts.embedding)[0], own)
        tied = base(parts.head)[0] is base(parts.embedding)[0] and (not copy or not adapters(parts.head))
        output = reader.head(parts.head, embedding if tied else None, vocab_limit)
        return DecoderWeights(
            shape=parts.shape,
            share=share,
            embedding=embedding,
            positions=kept_tensor(base(parts.positions)[0], own) if parts.positions is not None else None,
            embedding_norm=reader.norm(parts.embedding_norm),
            project_in=reader.whole(parts.project_in),
            project_out=reader.whole(parts.project_out),
            final_norm=reader.norm(parts.final_norm),
            head=output,
            layers=tuple(layers),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Reader:
    """From modules whose parameters are whole to weights. Without `copy` nothing is packed, joined or merged."""

    shape: Shape
    share: Share
    rows: int | None
    own: bool
    copy: bool

    def projection(self, weight: Tensor, bias: Tensor | None) -> Projection:
        return Projection(kept_tensor(weight, self.own), kept_tensor(bias, self.own), rows=self.rows)

    def module(self, module: nn.Module) -> Projection:
        if self.copy:
            return self.projection(*dense(module))
        weight, bias = base(module)
        return Projection(weight.detach(), kept_tensor(bias, False), rows=None, adapters=adapters(module))

    def whole(self, module: nn.Module | None) -> Projection | None:
        return self.module(module) if module is not None else None

    def head(self, module: nn.Module, tied: Tensor | None, vocab_limit: int) -> Projection:
        """The output layer's first rows; `tied` is a weight that is shared with the embedding."""
        weight, bias = dense(module) if self.copy else base(module)
        weight = (kept_tensor(weight, self.own) if tied is None else tied)[:vocab_limit]
        bias = None if bias is None else kept_tensor(bias[:vocab_limit], self.own)
        beside = () if self.copy else adapters(module)
        cut = tuple(replace(adapter, up=adapter.up[:vocab_limit]) for adapter in beside)
        return Projection(weight, bias, rows=self.rows, adapters=cut)

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
        if not self.copy:
            return self.module(module)
        weight, bias = dense(module)
        return self.projection(self.share.of(weight, 1), bias if self.share.rank == 0 else None)

    def qkv(self, modules: tuple[nn.Module, ...]) -> Projection | Apart:
        packed = self.rows is not None and packs(base(modules[0])[0])
        copied = self.own or packed or any(map(adapters, modules))
        if not self.copy or not copied:
            apart = tuple(map(self.module, modules))
            return Apart(apart, per_head=self.shape.heads if self.shape.per_head else None)
        weights = [dense(module) for module in modules]
        return self.by_rows(_by_role(weights[0], self.shape) if self.shape.per_head else weights)

    def up(self, module: nn.Module) -> Projection:
        return self.by_rows([dense(module)]) if self.copy else self.module(module)

    def layer(self, parts: LayerParts) -> LayerWeights:
        gate, up = parts.up if self.shape.gated else (None, parts.up[0])
        return LayerWeights(
            attention_norm=Norm(parts.attention_norm, own=self.own),
            qkv=self.qkv(parts.qkv),
            query_norm=self.norm(parts.query_norm),
            key_norm=self.norm(parts.key_norm),
            out=self.by_columns(parts.out),
            mlp_norm=Norm(parts.mlp_norm, own=self.own),
            gate=self.up(gate) if gate is not None else None,
            up=self.up(up),
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


def base(module: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a linear layer or an embedding, without adapters."""
    inner: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return inner.weight, getattr(inner, "bias", None)


def adapters(module: Any) -> tuple[Adapter, ...]:
    """The adapters of a module that are on."""
    if not isinstance(module, BaseTunerLayer) or module.disable_adapters:
        return ()
    assert isinstance(module, LoraLayer), "decoder_parts lets no others pass"
    found = []
    for name in module.active_adapters:
        down: Any = module.lora_A[name].weight
        up: Any = module.lora_B[name].weight
        found.append(Adapter(down=down.detach(), up=up.detach(), scale=module.scaling[name]))
    return tuple(found)


def dense(module: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a linear layer or an embedding; adapters that are on are added up in fp32."""
    weight, bias = base(module)
    beside = adapters(module)
    if beside:
        merged = weight.float()
        for adapter in beside:
            merged = merged + adapter.scale * (adapter.up.float() @ adapter.down.float())
        weight = merged.to(weight.dtype)
    return weight, bias


@torch.no_grad()
def plain_weights(model: nn.Module, *, gather: Gather, own: bool) -> Generator[tuple[str, Tensor]]:
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
                    (f"{name}.{part}", kept_tensor(own_part, own))
                    for part, own_part in found.items()
                    if own_part is not None
                )
        elif any(parameter is not None for parameter in module._parameters.values()):
            with gather(module):
                for part, parameter in module._parameters.items():
                    if parameter is not None:
                        yield f"{name}.{part}", kept_tensor(parameter, own)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)
    elif is_dataclass(value):
        for part in fields(value):
            yield from _tensors(getattr(value, part.name))
    elif isinstance(value, Projection | Apart | Norm):
        for part in vars(value).values():
            yield from _tensors(part)
