"""The equations of rlhf/functional as plain Python loops over lists, and random inputs for them.

Nothing here uses tensors to compute: it is what the tested functions must agree with.
"""

import math
from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

Rows = list[list[float]]
MaskRows = list[list[bool]]
POISON = [math.nan, math.inf, -math.inf]


@st.composite
def right_padded_masks(draw: st.DrawFn, *, allow_empty: bool = False) -> Tensor:
    """Masks [B, R] of rows that are True up to some length: full rows, single tokens and, if allowed, empty rows."""
    width = draw(st.integers(1, 7))
    lengths = draw(st.lists(st.integers(0 if allow_empty else 1, width), min_size=1, max_size=4))
    return torch.tensor([[t < length for t in range(width)] for length in lengths])


@st.composite
def any_masks(draw: st.DrawFn) -> Tensor:
    """Masks [B, R] with True anywhere, or nowhere."""
    height, width = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    cells = draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    return torch.tensor(cells).view(height, width)


def random_like(mask: Tensor, *, seed: int, scale: float = 1.0) -> Tensor:
    """Normal fp64 numbers in the mask's shape, so that a comparison with a loop can be tight."""
    return scale * torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def poisoned(values: Tensor, mask: Tensor) -> Tensor:
    """The values with NaN and infinities in turn wherever the mask is False."""
    bad = torch.tensor(POISON, dtype=values.dtype)[torch.arange(values.numel()) % 3].view(values.shape)
    return torch.where(mask, values, bad)


def selected(values: Rows, mask: MaskRows) -> list[float]:
    """The values under the mask, in reading order."""
    return [x for row, flags in zip(values, mask, strict=True) for x, flag in zip(row, flags, strict=True) if flag]


def log_softmax(logits: Sequence[float], temperature: float) -> list[float]:
    """log softmax(logits / temperature)."""
    scaled = [x / temperature for x in logits]
    top = max(scaled)
    normalizer = top + math.log(sum(math.exp(x - top) for x in scaled))
    return [x - normalizer for x in scaled]


def gae_loop(rewards: list[float], values: list[float], *, gamma: float, gae_lambda: float) -> list[float]:
    """A_t as the explicit sum over l of (gamma lambda)^l delta_{t+l}, for one episode that ends with the list."""
    length = len(rewards)
    after = [*values[1:], 0.0]
    deltas = [rewards[t] + gamma * after[t] - values[t] for t in range(length)]
    return [sum((gamma * gae_lambda) ** (k - t) * deltas[k] for k in range(t, length)) for t in range(length)]


def policy_loss_loop(
    new: list[float], old: list[float], advantages: list[float], *, clip_range: float, dual_clip: float | None
) -> tuple[float, int]:
    """The loss summed over tokens, and at how many of them the ratio has no influence on it."""
    total, clipped = 0.0, 0
    for logprob, old_logprob, advantage in zip(new, old, advantages, strict=True):
        ratio = math.exp(min(max(logprob - old_logprob, -20.0), 20.0))
        limited = min(max(ratio, 1 - clip_range), 1 + clip_range)
        objective = min(advantage * ratio, advantage * limited)
        held = advantage * limited < advantage * ratio
        if dual_clip is not None and advantage < 0 and dual_clip * advantage > objective:
            objective, held = dual_clip * advantage, True
        total, clipped = total - objective, clipped + held
    return total, clipped


def value_loss_loop(
    values: list[float], old_values: list[float], returns: list[float], *, value_clip_range: float
) -> tuple[float, int]:
    """The loss summed over tokens, and at how many of them the clipped error is the larger one."""
    total, clipped = 0.0, 0
    for value, old_value, target in zip(values, old_values, returns, strict=True):
        limited = min(max(value, old_value - value_clip_range), old_value + value_clip_range)
        plain, held = (value - target) ** 2, (limited - target) ** 2
        total, clipped = total + 0.5 * max(plain, held), clipped + (held > plain)
    return total, clipped
