"""A decoder's blocks on a CPU, compiled: weights and cache are read where they are, without copies (kernel/decode.cpp).

Numbers are rounded where the model's own code rounds them. A token's sums do not depend on the tokens beside it.
"""

import ctypes
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlhf.models.decoder.layers import Apart, Norm, Projection
from rlhf.models.decoder.parts import DecoderParts
from rlhf.models.decoder.weights import DecoderWeights, LayerWeights, adapters, base
from rlhf.rollout.native.arena import Arena

_pointer, _number = ctypes.c_void_p, ctypes.c_int64
ACTIVATIONS = {"relu": 0, "silu": 1, "gelu": 2, "gelu_pytorch_tanh": 3}


class _Matrix(ctypes.Structure):
    _fields_ = (("weight", _pointer), ("bias", _pointer), ("outputs", _number), ("inputs", _number))


class _Norm(ctypes.Structure):
    _fields_ = (("weight", _pointer), ("bias", _pointer), ("centred", _number), ("epsilon", ctypes.c_double))


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Norm) for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm")),
        ("qkv", _Matrix * 3),
        *((name, _Matrix) for name in ("out", "gate", "up", "down")),
        ("per_head", _number),
        ("kept", _pointer),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        *((name, _number) for name in ("layers", "width", "heads", "kv_heads", "head_dim", "inner", "activation")),
        *((name, _number) for name in ("parallel", "norm_after", "slots", "length", "rotary")),
        ("scale", ctypes.c_double),
        *((name, _pointer) for name in ("cosines", "sines", "alibi", "layer")),
    )


def reason_against(parts: DecoderParts, *, merged: bool) -> str | None:
    """Why the compiled blocks cannot compute a decoder; None if they can. `merged`: adapters are, if there are any."""
    shape = parts.shape
    if shape.activation not in ACTIVATIONS:
        return f"activation {shape.activation}"
    if shape.head_dim % 2:
        return f"heads of {shape.head_dim} numbers"
    if not merged and any(map(adapters, parts.dense())):
        return "adapters beside the weights"
    inner = [(layer.attention_norm, layer.mlp_norm, layer.query_norm, layer.key_norm) for layer in parts.layers]
    norms = [norm for norms in inner for norm in norms if norm is not None]
    if any(getattr(norm, "weight", None) is None for norm in norms):
        return "norms without weights"
    kinds = {base(part)[0].dtype for part in (*parts.dense(), *norms)}
    if len(kinds) > 1 or not kinds <= {torch.float32, torch.bfloat16}:
        return "weights in " + " and ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
    return None


class CompiledBlocks:
    """The blocks and the output layer of a decoder against which there is no reason.

    Args:
        library: of `load_library`.
        weights, arena: must stay where they are as long as this is used.
    """

    def __init__(self, library: ctypes.CDLL, weights: DecoderWeights, arena: Arena) -> None:
        self._library, self._weights, self._arena = library, weights, arena
        shape = weights.shape
        tables = [id(table) for table in (shape.rotary, shape.alibi)]  # In fp32.
        for tensor in weights.tensors():
            assert tensor.is_contiguous() and (tensor.dtype == weights.dtype or id(tensor) in tables)
        for part in (weights.head, *(part for layer in weights.layers for part in _projections(layer))):
            assert not part.packed and not part.adapters, "weights are read as they lie in the model"
        self._turns = shape.rotary_tables(torch.arange(arena.length), weights.dtype)
        cosines, sines = self._turns or (None, None)
        self._layers = (_Layer * shape.layers)(
            *(_layer(layer, kept) for layer, kept in zip(weights.layers, arena.layers, strict=True))
        )
        first = weights.layers[0]
        self._model = _Model(
            layers=shape.layers,
            width=first.out.features,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            inner=first.up.features,
            activation=ACTIVATIONS[shape.activation],
            parallel=shape.parallel,
            norm_after=shape.norm_after,
            slots=arena.slots,
            length=arena.length,
            rotary=cosines.shape[1] if cosines is not None else 0,
            scale=shape.scale,
            cosines=_address(cosines),
            sines=_address(sines),
            alibi=_address(shape.alibi),
            layer=ctypes.addressof(self._layers),
        )
        self._head = _matrix(weights.head)
        half = _number(weights.dtype == torch.bfloat16)
        self._kind = _number(library.decode_kind(ctypes.byref(self._model), ctypes.byref(self._head), half))
        self._threads = _number(torch.get_num_threads())
        asked = (self._kind, ctypes.byref(self._model), ctypes.byref(self._head))
        needed = library.decode_bytes(*asked, _number(arena.slots), self._threads)
        self._memory = torch.empty(needed, dtype=torch.uint8)

    def blocks(self, hidden: Float[Tensor, "n d"], positions: Int[Tensor, " n"]) -> None:
        """Run the tokens of the first n slots through all blocks, in place."""
        assert hidden.is_contiguous() and positions.is_contiguous() and len(hidden) <= self._arena.slots
        where = (_address(hidden), _address(positions), _address(self._memory))
        self._library.decode_blocks(
            self._kind, ctypes.byref(self._model), _number(len(hidden)), *map(_pointer, where), self._threads
        )

    def logits(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n V"]:
        """The output layer."""
        hidden = hidden.contiguous()
        result = hidden.new_empty(len(hidden), self._weights.head.features)
        where = (_address(hidden), _address(result), _address(self._memory))
        self._library.decode_product(
            self._kind, ctypes.byref(self._head), _number(len(hidden)), *map(_pointer, where), self._threads
        )
        return result


def _qkv(layer: LayerWeights) -> tuple[Projection, ...]:
    return layer.qkv.projections if isinstance(layer.qkv, Apart) else (layer.qkv,)


def _projections(layer: LayerWeights) -> list[Projection]:
    return [part for part in (*_qkv(layer), layer.out, layer.gate, layer.up, layer.down) if part is not None]


def _address(tensor: Any) -> int | None:
    return None if tensor is None else int(tensor.data_ptr())


def _matrix(part: Projection | None) -> _Matrix:
    if part is None:
        return _Matrix()
    return _Matrix(
        weight=_address(part.weight), bias=_address(part.bias), outputs=part.features, inputs=part.weight.shape[1]
    )


def _norm(norm: Norm | None) -> _Norm:
    if norm is None:
        return _Norm()
    return _Norm(weight=_address(norm.weight), bias=_address(norm.bias), centred=norm.centred, epsilon=norm.epsilon)


def _layer(layer: LayerWeights, kept: Tensor) -> _Layer:
    return _Layer(
        attention_norm=_norm(layer.attention_norm),
        mlp_norm=_norm(layer.mlp_norm),
        query_norm=_norm(layer.query_norm),
        key_norm=_norm(layer.key_norm),
        qkv=(_Matrix * 3)(*map(_matrix, _qkv(layer))),
        out=_matrix(layer.out),
        gate=_matrix(layer.gate),
        up=_matrix(layer.up),
        down=_matrix(layer.down),
        per_head=isinstance(layer.qkv, Apart) and layer.qkv.per_head is not None,
        kept=_address(kept),
    )
