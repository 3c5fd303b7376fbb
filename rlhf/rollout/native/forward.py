"""A decoder's arithmetic on tokens without padding: prompts in one piece, then one token of each sequence at a time."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.models.decoder.weights import DecoderWeights, LayerWeights
from rlhf.rollout.native.arena import Arena
from rlhf.rollout.native.compiled import CompiledBlocks

Reduce = Callable[[Tensor], None]
# Layer, queries [N, heads, head_dim], keys and then values [N, 2 * kv_heads, head_dim] -> [N, heads * head_dim].
Attend = Callable[[int, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoder:
    """Weights, how the ranks that share them add up their parts (None: there is one), and compiled blocks, if any."""

    weights: DecoderWeights
    reduce: Reduce | None = None
    compiled: CompiledBlocks | None = None

    def prefill(self, prompts: list[Int[Tensor, " _"]], first: int, arena: Arena) -> Float[Tensor, "n V"]:
        """Run n prompts, fill the slots from `first` on, and return the logits behind each prompt."""
        device, kv_heads = self.weights.device, self.weights.kv_heads
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        rows = torch.arange(len(prompts)).repeat_interleave(lengths)
        columns = torch.cat([torch.arange(len(prompt)) for prompt in prompts])
        longest = int(lengths.max())
        places = (rows * longest + columns).to(device)
        bias = self._prefill_bias(longest)
        count = len(prompts)

        def padded(values: Tensor) -> Tensor:
            flat = values.new_zeros(count * longest, values.shape[1] * values.shape[2])
            flat.index_copy_(0, places, values.flatten(1))
            return flat.view(count, longest, values.shape[1], values.shape[2]).transpose(1, 2)

        def attend(layer: int, queries: Tensor, both: Tensor) -> Tensor:
            wide = padded(both)
            kept = arena.layers[layer][:, first : first + count]
            kept[..., :longest, :] = wide.view(count, 2, kv_heads, longest, -1).transpose(0, 1)
            kept[..., longest:, :] = 0  # What another sequence left there would count if it were not finite.
            # A prompt's padding stands behind it, where none of its tokens looks.
            mixed = F.scaled_dot_product_attention(
                padded(queries),
                wide[:, :kv_heads],
                wide[:, kv_heads:],
                attn_mask=bias,
                is_causal=bias is None,
                scale=self.weights.shape.scale,
                enable_gqa=queries.shape[1] != kv_heads,
            )
            return mixed.transpose(1, 2).reshape(count * longest, -1)[places]

        hidden = self._blocks(torch.cat(prompts).to(device), columns.to(device), attend)
        return self._logits(hidden[(lengths.cumsum(0) - 1).to(device)])

    def decode(
        self, ids: Int[Tensor, " n"], positions: Int[Tensor, " n"], arena: Arena, *, length: int
    ) -> Float[Tensor, "n V"]:
        """Run one token of each of the first n slots, at its position, and return the logits behind it.

        `length` is above all positions.
        """
        if self.compiled is not None:
            hidden = self._embedded(ids, positions)
            self.compiled.blocks(hidden, positions)
            return self.compiled.logits(self._finished(hidden))
        shape, count = self.weights.shape, ids.shape[0]
        kv_heads = self.weights.kv_heads
        places = arena.places(positions)
        bias = self._decode_bias(arena.behind(positions, length=length))

        def attend(layer: int, queries: Tensor, both: Tensor) -> Tensor:
            kept = arena.layers[layer]
            kept.view(-1, shape.head_dim).index_copy_(0, places, both.reshape(-1, shape.head_dim))
            keys, values = kept[:, :count, :, :length].unbind()
            # The queries of all heads that share keys stand where one head's tokens would.
            grouped = queries.reshape(count, kv_heads, -1, shape.head_dim)
            mixed = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=bias, scale=shape.scale)
            return mixed.reshape(count, -1)

        return self._logits(self._blocks(ids, positions, attend))

    def _blocks(self, ids: Int[Tensor, " N"], positions: Int[Tensor, " N"], attend: Attend) -> Float[Tensor, "N d"]:
        x = self._embedded(ids, positions)
        turns = self._turns(positions, x.dtype)
        for index, layer in enumerate(self.weights.layers):
            x = self._block(layer, x, turns, partial(attend, index))
        return self._finished(x)

    def _embedded(self, ids: Int[Tensor, " N"], positions: Int[Tensor, " N"]) -> Float[Tensor, "N d"]:
        weights = self.weights
        x = F.embedding(ids, weights.embedding)
        if weights.embedding_norm is not None:
            x = weights.embedding_norm(x)
        if weights.project_in is not None:
            x = weights.project_in(x)
        if weights.positions is not None:
            x = x + F.embedding(positions + weights.shape.position_offset, weights.positions)
        return x

    def _finished(self, x: Float[Tensor, "N d"]) -> Float[Tensor, "N e"]:
        weights = self.weights
        if weights.final_norm is not None:
            x = weights.final_norm(x)
        return weights.project_out(x) if weights.project_out is not None else x

    def _block(
        self,
        layer: LayerWeights,
        x: Tensor,
        turns: tuple[Tensor, Tensor] | None,
        attend: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        shape = self.weights.shape
        queries, both = self._heads(layer, x if shape.norm_after else layer.attention_norm(x), turns)
        mixed = attend(queries, both)
        if shape.parallel:
            return self._added(layer.down, self._inner(layer, layer.mlp_norm(x)), self._added(layer.out, mixed, x))
        x = self._added(layer.out, mixed, x)
        if shape.norm_after:
            x = layer.attention_norm(x)
            return layer.mlp_norm(self._added(layer.down, self._inner(layer, x), x))
        return self._added(layer.down, self._inner(layer, layer.mlp_norm(x)), x)

    def _heads(self, layer: LayerWeights, x: Tensor, turns: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Queries [N, heads, head_dim], and keys and then values [N, 2 * kv_heads, head_dim]."""
        shape, heads, kv_heads = self.weights.shape, self.weights.heads, self.weights.kv_heads
        joint = layer.qkv(x).view(x.shape[0], heads + 2 * kv_heads, shape.head_dim)
        if layer.query_norm is not None and layer.key_norm is not None:
            queries, keys = layer.query_norm(joint[:, :heads]), layer.key_norm(joint[:, heads : heads + kv_heads])
            joint = torch.cat([queries, keys, joint[:, heads + kv_heads :]], dim=1)
        if turns is not None:
            joint = _turned(joint, turns)
        return joint[:, :heads], joint[:, heads:]

    def _inner(self, layer: LayerWeights, x: Tensor) -> Tensor:
        activation = self.weights.shape.activation
        if layer.gate is None:
            return layer.up(x, activation=activation)
        return layer.up(x, times=layer.gate(x, activation=activation))

    def _added(self, projection: Callable[..., Tensor], x: Tensor, residual: Tensor) -> Tensor:
        if self.reduce is None:
            return projection(x, add=residual)
        part = projection(x)
        self.reduce(part)
        return part + residual

    def _logits(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n V"]:
        return self.weights.head(hidden)

    def _turns(self, positions: Int[Tensor, " N"], dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Cosines and signed sines [N, heads + 2 * kv_heads, rotary dimensions] of rotary positions (Su et al. 2021).

        Values are not turned: their cosines are 1. With numbers for each head nothing is cut apart and joined again.
        """
        tables = self.weights.shape.rotary_tables(positions, dtype)
        if tables is None:
            return None
        turning, resting = self.weights.heads + self.weights.kv_heads, self.weights.kv_heads
        cosines, sines = (table.unsqueeze(1).expand(-1, turning, -1) for table in tables)
        still = cosines.new_ones(1, 1, 1).expand(cosines.shape[0], resting, cosines.shape[2])
        return torch.cat([cosines, still], dim=1), torch.cat([sines, torch.zeros_like(still)], dim=1)

    def _alibi(self, length: int) -> Float[Tensor, "heads 1 L"] | None:
        """Linear biases, rounded like the model's own."""
        slopes, share = self.weights.shape.alibi, self.weights.share
        if slopes is None:
            return None
        own = share.of(slopes, 0).to(self.weights.device)
        return (own.view(-1, 1, 1) * torch.arange(length, device=own.device)).to(self.weights.dtype)

    def _decode_bias(self, later: Bool[Tensor, "n L"]) -> Tensor:
        """What is added to scores [n, kv_heads or 1, heads that share keys or 1, L]: -inf for what is behind."""
        alibi, own = self._alibi(later.shape[1]), later[:, None, None]
        if alibi is None:
            return torch.zeros(own.shape, dtype=self.weights.dtype, device=own.device).masked_fill_(own, -torch.inf)
        return alibi.view(1, self.weights.kv_heads, -1, later.shape[1]).masked_fill(own, -torch.inf)

    def _prefill_bias(self, length: int) -> Tensor | None:
        alibi = self._alibi(length)
        if alibi is None:
            return None
        later = torch.ones(length, length, dtype=torch.bool, device=alibi.device).triu(1)
        return alibi.expand(-1, length, -1).masked_fill(later, -math.inf)


def _turned(x: Float[Tensor, "N h D"], turns: tuple[Tensor, Tensor]) -> Float[Tensor, "N h D"]:
    """Turn the first dimensions of each head by its position's angles; the others stay."""
    cosine, sine = turns
    width = cosine.shape[-1]
    if width == x.shape[-1]:
        return torch.addcmul(x * cosine, x.roll(width // 2, -1), sine)
    part = x[..., :width]
    return torch.cat([torch.addcmul(part * cosine, part.roll(width // 2, -1), sine), x[..., width:]], dim=-1)
