"""Log-probabilities straight from a language model's last hidden states: the logits are never held whole."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Logits held at a time: 8 MiB of them in fp32, unless so many tokens come together that the slices get too thin.
CHUNK_NUMBERS, LEAST_COLUMNS = 2**21, 1024


def _wide(values: Tensor) -> Tensor:
    """At least fp32: fp64 stays as it is, so that gradients can be checked numerically."""
    return values if values.dtype == torch.float64 else values.float()


def _slices(num_tokens: int, num_columns: int, chunk_columns: int | None) -> Iterator[slice]:
    width = chunk_columns or max(LEAST_COLUMNS, CHUNK_NUMBERS // max(1, num_tokens))
    return (slice(start, min(start + width, num_columns)) for start in range(0, num_columns, width))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """Rounded to the weights' format as a plain layer's are, then widened."""
    logits = _wide(torch.nn.functional.linear(hidden, weight, bias))
    return logits if temperature == 1.0 else logits / temperature


class _HeadLogprobs(torch.autograd.Function):
    """Slices of the vocabulary, one after the other, forward and once more backward.

    Slicing the vocabulary instead of the tokens needs no accumulator for the weight's gradient: each slice of it is one
    matrix product, as exact as the plain one. Only the hidden states' gradient is summed up over the slices, in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        limit: int,
        temperature: float,
        chunk_columns: int | None,
    ) -> Tensor:
        """Hidden [N, D], weight [V, D], bias [V], ids [N] to log-probabilities and entropies [N, 2]."""
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        top = torch.full((len(hidden),), -torch.inf, dtype=wide, device=hidden.device)
        total, weighted, picked = (torch.zeros_like(top) for _ in range(3))
        for columns in _slices(len(hidden), limit, chunk_columns):
            logits = _logits(hidden, weight[columns], None if bias is None else bias[columns], temperature)
            higher = torch.maximum(top, logits.amax(dim=1))
            shrink = torch.exp(top - higher)
            local = (ids - columns.start).clamp(0, logits.shape[1] - 1)
            inside = (ids >= columns.start) & (ids < columns.stop)
            picked = torch.where(inside, logits.gather(1, local.unsqueeze(1)).squeeze(1), picked)
            shares = (logits - higher.unsqueeze(1)).exp_()
            total = total * shrink + shares.sum(dim=1)
            weighted = weighted * shrink + logits.mul_(shares).sum(dim=1)
            top = higher
        normalizer = top + total.log()
        ctx.save_for_backward(hidden, weight, bias, ids, normalizer)
        ctx.options = limit, temperature, chunk_columns
        return torch.stack([picked - normalizer, normalizer - weighted / total], dim=1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """With `d = g (1[j = id] - softmax(x / t)_j) / t`: `dh = d W`, `dW = d^T h`; entropies have no gradient."""
        hidden, weight, bias, ids, normalizer = ctx.saved_tensors
        limit, temperature, chunk_columns = ctx.options
        incoming = (grad_outputs[0][:, 0] / temperature).unsqueeze(1)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden, dtype=normalizer.dtype) if needs_hidden else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        grad_bias = torch.zeros_like(bias) if needs_bias else None
        for columns in _slices(len(hidden), limit, chunk_columns):
            logits = _logits(hidden, weight[columns], None if bias is None else bias[columns], temperature)
            d = logits.sub_(normalizer.unsqueeze(1)).exp_().mul_(-incoming)
            inside = (ids >= columns.start) & (ids < columns.stop)
            local = (ids - columns.start).clamp(0, d.shape[1] - 1)
            d.scatter_add_(1, local.unsqueeze(1), torch.where(inside.unsqueeze(1), incoming, 0.0))
            d = d.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden += d @ weight[columns]
            if grad_weight is not None:
                grad_weight[columns] = d.T @ hidden
            if grad_bias is not None:
                grad_bias[columns] = d.sum(dim=0)
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(hidden.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def head_logprobs(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    bias: Float[Tensor, " V"] | None,
    ids: Int[Tensor, " N"],
    *,
    limit: int | None = None,
    temperature: float = 1.0,
    chunk_columns: int | None = None,
) -> Float[Tensor, "N 2"]:
    """Log-probability of each id under `softmax((h W^T + b) / temperature)`, and the distribution's entropy, in nats.

    What `token_logprobs` and `entropy` make of the logits, in fp32 (fp64 stays fp64), but at most N x
    `chunk_columns` logits exist at a time, in either direction (None: about 2 million in all). Log-probabilities have
    gradients with respect to hidden states, weight and bias; entropies have none. Columns from `limit` on, padding of
    the vocabulary, have no probability; ids must be below it. N may be 0.
    """
    columns = weight.shape[0] if limit is None else min(limit, weight.shape[0])
    result: Tensor = _HeadLogprobs.apply(hidden, weight, bias, ids, columns, temperature, chunk_columns)  # type: ignore[no-untyped-call]
    return result
