"""Log-probabilities and entropies of tokens in fp32, without a float32 copy of the whole logits."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK_SIZE = 512


def _wide(logits: Tensor) -> Tensor:
    """At least fp32: fp64 stays as it is, so that gradients can be checked numerically."""
    return logits if logits.dtype == torch.float64 else logits.float()


class _TokenLogprobs(torch.autograd.Function):
    """`x_id / t - logsumexp(x / t)` over chunks of rows; the backward pass recomputes the softmax chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, temperature: float, chunk_size: int) -> Tensor:
        """Logits [N, V] and ids [N] to log-probabilities [N]."""
        picked, normalizers = [], []
        for part, part_ids in zip(torch.split(logits, chunk_size), torch.split(ids, chunk_size), strict=True):
            scaled = _wide(part) / temperature
            picked.append(scaled.gather(1, part_ids.unsqueeze(1)).squeeze(1))
            normalizers.append(scaled.logsumexp(dim=1))
        normalizer = torch.cat(normalizers)
        ctx.save_for_backward(logits, ids, normalizer)
        ctx.temperature, ctx.chunk_size = temperature, chunk_size
        return torch.cat(picked) - normalizer

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        """`d/dx_j = (1[j = id] - softmax(x / t)_j) / t`, times the incoming gradient."""
        logits, ids, normalizer = ctx.saved_tensors
        size = ctx.chunk_size
        gradient = torch.empty_like(logits)
        chunks = (torch.split(tensor, size) for tensor in (logits, gradient, ids, normalizer, grad_outputs[0]))
        for part, out, part_ids, part_normalizer, incoming in zip(*chunks, strict=True):
            weight = (incoming / ctx.temperature).unsqueeze(1)
            local = torch.exp(_wide(part) / ctx.temperature - part_normalizer.unsqueeze(1)).mul_(-weight)
            out.copy_(local.scatter_add_(1, part_ids.unsqueeze(1), weight))
        return gradient, None, None, None


def token_logprobs(
    logits: Float[Tensor, "*shape V"],
    ids: Int[Tensor, "*shape"],
    *,
    temperature: float = 1.0,
    chunk_size: int = CHUNK_SIZE,
) -> Float[Tensor, "*shape"]:
    """Log-probability in nats of each id under its logits: `log softmax(logits / temperature)[id]`.

    The result is fp32 whatever the logits' format (fp64 stays fp64), the gradient has the logits' format. At most
    `chunk_size` x V numbers are held in fp32 at a time, in either direction. Entries of -inf have probability 0; ids
    must be below V everywhere, also where a mask hides the result.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    result: Tensor = _TokenLogprobs.apply(flat, ids.reshape(-1), temperature, chunk_size)  # type: ignore[no-untyped-call]
    return result.view(ids.shape)


@torch.no_grad()
def entropy(
    logits: Float[Tensor, "*shape V"], *, temperature: float = 1.0, chunk_size: int = CHUNK_SIZE
) -> Float[Tensor, "*shape"]:
    """Entropy in nats of each distribution: `-sum_j p_j log p_j`, `p = softmax(logits / temperature)`.

    Without gradient, in fp32, over chunks of at most `chunk_size` tokens. Entries of -inf contribute nothing.
    """
    parts = []
    for part in torch.split(logits.reshape(-1, logits.shape[-1]), chunk_size):
        logprobs = (_wide(part) / temperature).log_softmax(dim=1)
        probabilities = logprobs.exp()
        parts.append(-torch.where(probabilities > 0, probabilities * logprobs, 0.0).sum(dim=1))
    return torch.cat(parts).view(logits.shape[:-1])
