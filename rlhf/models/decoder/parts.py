"""Where the parts of a causal language model are: one description for OPT, Llama, Qwen, GPT-NeoX and Bloom."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


class UnsupportedModelError(Exception):
    """A model that native decoding does not know; the message says which part of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What is fixed in a decoder's arithmetic.

    Attributes:
        heads, kv_heads, head_dim: of the attention; `heads` is a multiple of `kv_heads`.
        activation: the MLP's, a name that transformers knows.
        gated: the MLP computes act(gate x) * up x instead of act(up x).
        rotary: inverse frequencies [rotary dimensions / 2] of rotary positions, fp32; None without them.
        rotary_scale: factor of the rotary sines and cosines.
        alibi: slopes [heads] of linear biases, fp32; None without them.
        scale: factor of the attention scores.
        parallel: attention and MLP read the same residual (GPT-NeoX).
        norm_after: norms stand behind attention and MLP instead of before them (OPT-350M).
        per_head: rows of the joint projection are ordered head by head: q, k, v of the first head, then of the second.
        position_offset: added to a position before its embedding is looked up.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    activation: str
    scale: float
    gated: bool = False
    rotary: Tensor | None = None
    rotary_scale: float = 1.0
    alibi: Tensor | None = None
    parallel: bool = False
    norm_after: bool = False
    per_head: bool = False
    position_offset: int = 0

    def to(self, device: torch.device | str) -> "Shape":
        """The same with its tables on a device."""
        rotary, alibi = (None if table is None else table.to(device) for table in (self.rotary, self.alibi))
        return replace(self, rotary=rotary, alibi=alibi)

    def rotary_tables(
        self, positions: Int[Tensor, " N"], dtype: torch.dtype
    ) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N D"]] | None:
        """Cosines and sines of rotary positions for a head's first D dimensions (Su et al. 2021); None without them.

        x is turned by x * cosines + roll(x, D / 2) * sines: the first half of the sines is negative.
        """
        if self.rotary is None:
            return None
        angles = positions.float().unsqueeze(1) * self.rotary.to(positions.device)
        cosine, sine = angles.cos() * self.rotary_scale, angles.sin() * self.rotary_scale
        return torch.cat([cosine, cosine], dim=1).to(dtype), torch.cat([-sine, sine], dim=1).to(dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerParts:
    """The modules of one block. `qkv` is one joint projection or three; `up` is the gate, if there is one, and up."""

    module: nn.Module
    attention_norm: nn.Module
    qkv: tuple[nn.Module, ...]
    out: nn.Module
    mlp_norm: nn.Module
    up: tuple[nn.Module, ...]
    down: nn.Module
    query_norm: nn.Module | None = None
    key_norm: nn.Module | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderParts:
    """The modules of a decoder in the order of its arithmetic."""

    shape: Shape
    embedding: nn.Module
    head: nn.Module
    final_norm: nn.Module | None
    layers: tuple[LayerParts, ...] = field(repr=False)
    positions: nn.Module | None = None
    embedding_norm: nn.Module | None = None
    project_in: nn.Module | None = None
    project_out: nn.Module | None = None

    def dense(self) -> list[nn.Module]:
        """The modules with a matrix, which may be adapted."""
        outer = [self.embedding, self.positions, self.project_in, self.project_out, self.head]
        inner = [part for layer in self.layers for part in (*layer.qkv, layer.out, *layer.up, layer.down)]
        return [*(part for part in outer if part is not None), *inner]

    def outer(self) -> list[nn.Module]:
        """The modules outside the blocks."""
        found = (
            self.embedding,
            self.positions,
            self.embedding_norm,
            self.project_in,
            self.project_out,
            self.final_norm,
            self.head,
        )
        return [part for part in found if part is not None]


def decoder_parts(model: Any) -> DecoderParts:
    """The parts of a causal language model of transformers, adapted or not.

    Raises:
        UnsupportedModelError: another family, an option of it that the arithmetic here does not have, or adapters that
            cannot be merged.
    """
    kind = model.config.model_type
    if kind not in _FAMILIES:
        raise UnsupportedModelError(f"models of type {kind}")
    parts = _FAMILIES[kind](model)
    for module in parts.dense():
        _check_adapters(module)
    return parts


def _check_adapters(module: nn.Module) -> None:
    if not isinstance(module, BaseTunerLayer):
        return
    if not isinstance(module, LoraLayer) or not isinstance(module.get_base_layer(), nn.Linear):
        raise UnsupportedModelError(f"adapters of class {type(module).__name__}")
    if any(module.use_dora.values()):
        raise UnsupportedModelError("adapters that change the length of weights (DoRA)")
    if any(module.lora_bias.values()) or getattr(module, "fan_in_fan_out", False):
        raise UnsupportedModelError("adapters with biases or transposed weights")


def _opt(model: Any) -> DecoderParts:
    config, decoder = model.config, model.model.decoder
    if not config.layer_norm_elementwise_affine:
        raise UnsupportedModelError("OPT with norms without weights")
    layers = tuple(
        LayerParts(
            module=layer,
            attention_norm=layer.self_attn_layer_norm,
            qkv=(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
            out=layer.self_attn.out_proj,
            mlp_norm=layer.final_layer_norm,
            up=(layer.fc1,),
            down=layer.fc2,
        )
        for layer in decoder.layers
    )
    head_dim = config.hidden_size // config.num_attention_heads
    shape = Shape(
        layers=len(layers),
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        head_dim=head_dim,
        activation=config.activation_function,
        scale=head_dim**-0.5,
        norm_after=not config.do_layer_norm_before,
        position_offset=decoder.embed_positions.offset,
    )
    return DecoderParts(
        shape=shape,
        embedding=decoder.embed_tokens,
        positions=decoder.embed_positions,
        project_in=decoder.project_in,
        project_out=decoder.project_out,
        final_norm=decoder.final_layer_norm,
        layers=layers,
        head=model.lm_head,
    )


def _llama(model: Any) -> DecoderParts:
    config, decoder = model.config, model.model
    _no_sliding_window(config)
    layers = tuple(
        LayerParts(
            module=layer,
            attention_norm=layer.input_layernorm,
            qkv=(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
            out=layer.self_attn.o_proj,
            mlp_norm=layer.post_attention_layernorm,
            up=(layer.mlp.gate_proj, layer.mlp.up_proj),
            down=layer.mlp.down_proj,
            query_norm=getattr(layer.self_attn, "q_norm", None),
            key_norm=getattr(layer.self_attn, "k_norm", None),
        )
        for layer in decoder.layers
    )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotary, rotary_scale = _rotary(decoder.rotary_emb)
    shape = Shape(
        layers=len(layers),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        activation=config.hidden_act,
        scale=head_dim**-0.5,
        gated=True,
        rotary=rotary,
        rotary_scale=rotary_scale,
    )
    return DecoderParts(
        shape=shape,
        embedding=decoder.embed_tokens,
        final_norm=decoder.norm,
        layers=layers,
        head=model.lm_head,
    )


def _joint(layer: Any, attention: Any) -> LayerParts:
    """A block with one joint projection of queries, keys and values."""
    return LayerParts(
        module=layer,
        attention_norm=layer.input_layernorm,
        qkv=(attention.query_key_value,),
        out=attention.dense,
        mlp_norm=layer.post_attention_layernorm,
        up=(layer.mlp.dense_h_to_4h,),
        down=layer.mlp.dense_4h_to_h,
    )


def _gpt_neox(model: Any) -> DecoderParts:
    config, decoder = model.config, model.gpt_neox
    layers = tuple(_joint(layer, layer.attention) for layer in decoder.layers)
    head_dim = config.hidden_size // config.num_attention_heads
    rotary, rotary_scale = _rotary(decoder.rotary_emb)
    shape = Shape(
        layers=len(layers),
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        head_dim=head_dim,
        activation=config.hidden_act,
        scale=head_dim**-0.5,
        rotary=rotary,
        rotary_scale=rotary_scale,
        parallel=config.use_parallel_residual,
        per_head=True,
    )
    return DecoderParts(
        shape=shape,
        embedding=decoder.embed_in,
        final_norm=decoder.final_layer_norm,
        layers=layers,
        head=model.get_output_embeddings(),
    )


def _bloom(model: Any) -> DecoderParts:
    config, decoder = model.config, model.transformer
    if config.apply_residual_connection_post_layernorm:
        raise UnsupportedModelError("Bloom whose residual is taken behind the norm")
    if config.pretraining_tp > 1 and config.slow_but_exact:
        raise UnsupportedModelError("Bloom with slow_but_exact")
    layers = tuple(_joint(layer, layer.self_attention) for layer in decoder.h)
    head_dim = config.hidden_size // config.n_head
    shape = Shape(
        layers=len(layers),
        heads=config.n_head,
        kv_heads=config.n_head,
        head_dim=head_dim,
        activation="gelu_pytorch_tanh",  # What Bloom's own function approximates.
        scale=head_dim**-0.5,
        alibi=alibi_slopes(config.n_head),
        per_head=True,
    )
    return DecoderParts(
        shape=shape,
        embedding=decoder.word_embeddings,
        embedding_norm=decoder.word_embeddings_layernorm,
        final_norm=decoder.ln_f,
        layers=layers,
        head=model.lm_head,
    )


_FAMILIES: dict[str, Callable[[Any], DecoderParts]] = {
    "opt": _opt,
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "gpt_neox": _gpt_neox,
    "bloom": _bloom,
}


def _no_sliding_window(config: Any) -> None:
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    # Mistral has no list of layers: there the window holds for all of them.
    if sliding or (config.model_type == "mistral" and config.sliding_window is not None):
        raise UnsupportedModelError("attention with a sliding window")


def _rotary(part: Any) -> tuple[Tensor, float]:
    if part.rope_type in ("dynamic", "longrope"):
        raise UnsupportedModelError(f"rotary positions of type {part.rope_type}, which depend on the sequence's length")
    return part.inv_freq.detach().float(), float(part.attention_scaling)


def alibi_slopes(heads: int) -> Tensor:
    """Slopes [heads] of attention with linear biases (Press et al. 2022, section 3, and their code for odd counts)."""
    whole = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (index + 1) / whole) for index in range(whole)]
    between = [2 ** (-4 * (index + 1) / whole) for index in range(0, 2 * (heads - whole), 2)]
    return torch.tensor([*slopes, *between], dtype=torch.float32)
