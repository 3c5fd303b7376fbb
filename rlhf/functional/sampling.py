"""From logits to tokens, each row with random numbers of its own."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_CHUNK = 256
_SHORT = 4096  # So many numbers are gone through one by one.
_CACHED = 1 << 18  # Numbers in fp32, of which some copies should stay in a core's cache.
_WORD = 1 << 64


def _signed(value: int) -> int:
    return value - _WORD if value >= _WORD // 2 else value


def _mixed(words: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """A bijection of 64-bit words whose outputs look random (the finaliser of SplitMix64, Steele et al. 2014)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        words = (words ^ ((words >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return words ^ ((words >> 31) & ((1 << 33) - 1))


def stream_keys(indices: Int[Tensor, " n"], *, seed: int) -> Int[Tensor, " n"]:
    """The key of each stream of random numbers: the same for the same seed and index, whatever stands beside it."""
    return _mixed(indices.long() * _signed(0x9E3779B97F4A7C15) + _signed(seed % _WORD))


def stream_uniforms(keys: Int[Tensor, " n"], count: int) -> Float[Tensor, "n count"]:
    """The first numbers of each stream, uniform in [0, 1) in steps of 2^-24, fp32."""
    places = torch.arange(1, count + 1, device=keys.device) * _signed(0x9E3779B97F4A7C15)
    return ((_mixed(keys.unsqueeze(1) + places) >> 40) & 0xFFFFFF).float() * 2.0**-24


def draw(logits: Float[Tensor, "n V"], uniforms: Float[Tensor, " n"]) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """Draw one id per row by inverting the distribution function; -inf is never drawn.

    Args:
        logits: of any format; the arithmetic is fp32.
        uniforms: numbers in [0, 1).

    Returns:
        ids [n], and the log-probability of each in nats [n].
    """
    # On a CPU as many rows at once as its caches hold.
    together = len(logits)
    if logits.device.type == "cpu":
        together = max(1, _CACHED * torch.get_num_threads() // logits.shape[1])
    starts, shares = range(0, len(logits), together), uniforms.unsqueeze(1)
    parts = [_drawn(logits[first : first + together], shares[first : first + together]) for first in starts]
    ids, logprobs = parts[0] if len(parts) == 1 else (torch.cat(part) for part in zip(*parts, strict=True))
    return ids, logprobs


def _drawn(logits: Float[Tensor, "n V"], shares: Float[Tensor, "n 1"]) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    weights = logits.softmax(dim=1, dtype=torch.float32)
    if weights.shape[1] <= _SHORT:
        running = weights.cumsum(dim=1)
        drawn = _place(weights, running, shares * running[:, -1:])
    else:  # Added up in chunks first, so that only one of them is gone through token by token.
        sums = _chunk_sums(weights)
        running = sums.cumsum(dim=1)
        amounts = shares * running[:, -1:]
        chunk = _place(sums, running, amounts)
        left = (amounts - (running.gather(1, chunk) - sums.gather(1, chunk))).clamp_(min=0.0)
        ids = chunk * _CHUNK + torch.arange(_CHUNK, device=weights.device)
        outside = ids >= weights.shape[1]
        inside = weights.gather(1, ids.clamp(max=weights.shape[1] - 1)).masked_fill_(outside, 0.0)
        drawn = ids.gather(1, _place(inside, inside.cumsum(dim=1), left))
    return drawn.squeeze(1), weights.gather(1, drawn).log_().squeeze(1)


def _chunk_sums(weights: Float[Tensor, "n V"]) -> Float[Tensor, "n C"]:
    whole = weights.shape[1] // _CHUNK * _CHUNK
    sums = weights[:, :whole].view(len(weights), -1, _CHUNK).sum(dim=2)
    return sums if whole == weights.shape[1] else torch.cat([sums, weights[:, whole:].sum(1, keepdim=True)], 1)


def _place(
    weights: Float[Tensor, "n C"], running: Float[Tensor, "n C"], amounts: Float[Tensor, "n 1"]
) -> Int[Tensor, "n 1"]:
    """Where the running sum first exceeds an amount, or as much as there is; never at a weight of zero."""
    if _adds_in_order(weights.device):
        most = running[:, -1:]
        amounts = torch.minimum(amounts, torch.nextafter(most, torch.zeros_like(most)))
        return torch.searchsorted(running, amounts, right=True).clamp_(max=weights.shape[1] - 1)
    # Sums that are made in parallel need not rise everywhere, nor rest at weights of zero: these are not looked at.
    reached = running.masked_fill(weights == 0.0, 0.0)
    most = reached.amax(dim=1, keepdim=True)
    amounts = torch.minimum(amounts, torch.nextafter(most, torch.zeros_like(most)))
    return (reached > amounts).to(torch.uint8).argmax(dim=1, keepdim=True)


def _adds_in_order(device: torch.device) -> bool:
    """Whether running sums are made by adding one number after the other."""
    return device.type == "cpu"


def restrict(
    logits: Float[Tensor, "n V"], *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Float[Tensor, "n V"]:
    """Set to -inf ids beyond the k likeliest, beyond the nucleus of mass p (Holtzman et al. 2020), and less likely than
    min_p times the likeliest (Nguyen et al. 2025), in this order. At least one stays."""
    if 0 < top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(dim=1)
        outside = ordered.softmax(dim=1).cumsum(dim=1) <= 1.0 - top_p
        outside[:, -1] = False
        logits = logits.masked_fill(outside.scatter(1, order, outside), -torch.inf)
    if min_p > 0.0:
        probabilities = logits.softmax(dim=1)
        logits = logits.masked_fill(probabilities < min_p * probabilities.amax(dim=1, keepdim=True), -torch.inf)
    return logits


def penalise_repetition(
    logits: Float[Tensor, "n V"], seen: Bool[Tensor, "n V"], *, penalty: float
) -> Float[Tensor, "n V"]:
    """Divide positive logits of ids that occurred by the penalty and multiply negative ones (Keskar et al. 2019)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
