"""Sums, means and whitening under a mask, and positions derived from one. A mask is True where a position counts.

Values outside the mask never matter, not even NaN or infinity: they are selected away, not multiplied by zero.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def _identity(sums: Tensor) -> Tensor:
    return sums


def masked_sum(values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Sum of the values where the mask is True: `sum_i m_i x_i`; 0 for an empty mask."""
    return torch.where(mask, values, 0.0).sum()


def masked_moments(
    values: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    all_reduce: Callable[[Tensor], Tensor] = _identity,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Mean and (biased) variance of the masked values of all ranks together, in fp64.

    Two passes: `mean = sum m x / sum m`, then `variance = sum m (x - mean)^2 / sum m`. Both are 0 for an empty mask.
    `all_reduce` takes an fp64 vector of this rank's sums and returns their sum over the ranks; it is called twice.
    """
    wide = values.detach().double()
    totals = all_reduce(torch.stack([masked_sum(wide, mask), mask.sum().double()]))
    count = totals[1].clamp(min=1)
    mean = totals[0] / count
    squares = all_reduce(masked_sum((wide - mean).square(), mask).reshape(1))
    return mean, squares[0] / count


def masked_whiten(
    values: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    mean: Float[Tensor, ""],
    variance: Float[Tensor, ""],
    shift_mean: bool = True,
    eps: float = 1e-8,
) -> Float[Tensor, "*shape"]:
    """Give the values unit variance: `(x - mean) / sqrt(variance + eps)`; 0 outside the mask.

    `mean` and `variance` come from `masked_moments`, over all ranks. Without `shift_mean` the mean is kept:
    `mean + (x - mean) / sqrt(variance + eps)`.
    """
    wide = (values.double() - mean) * torch.rsqrt(variance + eps)
    whitened = wide if shift_mean else wide + mean
    return torch.where(mask, whitened.to(values.dtype), 0.0)


def last_true_index(mask: Bool[Tensor, "B T"]) -> Int[Tensor, " B"]:
    """Index of each row's last True, on whichever side the padding is; 0 for a row without any."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, positions, 0).amax(dim=1)


def position_ids(attention_mask: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Position of each token among the real tokens of its row: `max(cumsum(mask) - 1, 0)`."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def left_aligned(ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> tuple[Int[Tensor, "B W"], Bool[Tensor, "B W"]]:
    """The same tokens in the same order from column 0 on, and their mask: W is the most tokens that a row has."""
    lengths = mask.sum(dim=1)
    width = int(lengths.max())
    # A stable sort brings the real tokens to the front and leaves their order.
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
    return ids.gather(1, order), torch.arange(width, device=mask.device) < lengths.unsqueeze(1)


def response_mask_from_ids(response_ids: Int[Tensor, "B R"], *, eos_id: int) -> Bool[Tensor, "B R"]:
    """True through each row's first EOS, EOS included; a row without EOS is True everywhere."""
    is_eos = (response_ids == eos_id).long()
    eos_before = is_eos.cumsum(dim=1) - is_eos
    return eos_before == 0


def block_causal_bias(segment_ids: Int[Tensor, "B T"], *, dtype: torch.dtype) -> Float[Tensor, "B 1 T T"]:
    """What is added to the attention scores of packed rows: 0 where token i may see token j, else the least number.

    Token i sees j if j <= i and both are of one example. Padding (segment 0) sees padding only, itself at least, so
    that no row of the softmax is empty.
    """
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    length = segment_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment_ids.device).tril()
    bias = torch.zeros(same.shape, dtype=dtype, device=segment_ids.device)
    return bias.masked_fill(~(same & causal), torch.finfo(dtype).min)[:, None]
