"""From logits to tokens, each row with random numbers of its own."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_CHUNK = 256
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

    The function is added up in chunks first, so that only one of them is gone through token by token.

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
    parts = [_chunk_sums(logits[first : first + together]) for first in range(0, len(logits), together)]
    top, sums = parts[0] if len(parts) == 1 else (torch.cat(part) for part in zip(*parts, strict=True))
    chunk, wanted, total = _place(sums, uniforms.unsqueeze(1))
    ids = chunk * _CHUNK + torch.arange(_CHUNK, device=logits.device)
    outside = ids >= logits.shape[1]
    inside = (logits.gather(1, ids.clamp(max=logits.shape[1] - 1)).float() - top).exp_().masked_fill_(outside, 0.0)
    place, _, _ = _place(inside, None, wanted=wanted)
    drawn = ids.gather(1, place)
    return drawn.squeeze(1), (logits.gather(1, drawn).float() - top - total.log()).squeeze(1)


def _chunk_sums(logits: Float[Tensor, "n V"]) -> tuple[Float[Tensor, "n 1"], Float[Tensor, "n C"]]:
    """Each row's largest logit, and the sums over chunks of what the others weigh relative to it."""
    values = logits.float()
    top = values.amax(dim=1, keepdim=True)
    weights = torch.sub(values, top).exp_()
    whole = weights.shape[1] // _CHUNK * _CHUNK
    sums = weights[:, :whole].view(len(weights), -1, _CHUNK).sum(dim=2)
    return top, sums if whole == weights.shape[1] else torch.cat([sums, weights[:, whole:].sum(1, keepdim=True)], 1)


def _place(
    weights: Tensor, uniforms: Tensor | None, *, wanted: Tensor | None = None
) -> tuple[Int[Tensor, "n 1"], Float[Tensor, "n 1"], Float[Tensor, "n 1"]]:
    """Where the running sum first exceeds a share of the whole, or an amount; what is left of it there; the whole."""
    running = weights.cumsum(dim=1)
    total = running[:, -1:]
    # Sums that are made in parallel need not rise everywhere, nor rest at weights of zero: these are not looked at.
    reached = running.masked_fill(weights == 0.0, 0.0)
    amount = uniforms * total if uniforms is not None else wanted
    assert amount is not None
    most = reached.amax(dim=1, keepdim=True)
    amount = torch.minimum(amount, torch.nextafter(most, torch.zeros_like(most)))
    place = (reached > amount).to(torch.uint8).argmax(dim=1, keepdim=True)
    left = amount - (running - weights).gather(1, place)
    return place, left.clamp_(min=0.0), total


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
