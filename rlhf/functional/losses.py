"""The losses. Each is a SUM over tokens or pairs: the caller divides by the count of the whole optimizer step.

The statistics are detached sums too, but for one maximum, so that micro-batches and ranks add up. What
lies outside a mask changes neither the loss nor its gradient, even if it is NaN or infinite.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf.functional.kl import LOG_RATIO_LIMIT, kl_k3
from rlhf.functional.masking import masked_sum


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyLossStats:
    """Detached scalars of one `policy_loss`; all are sums over tokens but `max_ratio_error`."""

    ratio: Float[Tensor, ""]
    max_ratio_error: Float[Tensor, ""]
    clipped: Float[Tensor, ""]
    approx_kl: Float[Tensor, ""]


@dataclass(frozen=True, kw_only=True, slots=True)
class ValueLossStats:
    """Detached sums over tokens of one `value_loss`."""

    clipped: Float[Tensor, ""]


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferenceLossStats:
    """Detached sums over pairs of one `preference_loss`."""

    correct: Float[Tensor, ""]
    margin: Float[Tensor, ""]


@dataclass(frozen=True, kw_only=True, slots=True)
class DpoStats:
    """Detached sums over pairs of one `dpo_loss`: pairs ranked rightly, beta times their margin, both log-ratios."""

    correct: Float[Tensor, ""]
    margin: Float[Tensor, ""]
    chosen: Float[Tensor, ""]
    rejected: Float[Tensor, ""]


def policy_loss(
    logprobs: Float[Tensor, "B R"],
    old_logprobs: Float[Tensor, "B R"],
    advantages: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    *,
    clip_range: float,
    dual_clip: float | None = None,
) -> tuple[Float[Tensor, ""], PolicyLossStats]:
    """Clipped surrogate loss, summed: `max(-A rho, -A clamp(rho, 1 ± clip_range))`, `rho = exp(logprob - old)`.

    Schulman et al. 2017, equation 7. `dual_clip` c > 1 bounds the loss of negative advantages by `-A c` (Ye et al.
    2020, equation 5). The log-ratio is held within ±20. Statistics: sum of rho, max |rho - 1|, number of tokens at
    which the clipped term (or the bound) decides, sum of k3 between the old and the new policy.
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    advantages = torch.where(mask, advantages, 0.0)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    losses = torch.maximum(plain, clipped)
    decided = clipped > plain
    if dual_clip is not None:
        bound = -advantages * dual_clip
        beyond = (advantages < 0) & (losses > bound)
        losses = torch.where(beyond, bound, losses)
        decided = decided | beyond
    with torch.no_grad():
        stats = PolicyLossStats(
            ratio=masked_sum(ratio, mask),
            max_ratio_error=torch.where(mask, (ratio - 1.0).abs(), 0.0).max(),
            clipped=(decided & mask).sum().to(ratio.dtype),
            approx_kl=masked_sum(kl_k3(torch.zeros_like(log_ratio), log_ratio), mask),
        )
    return masked_sum(losses, mask), stats


def value_loss(
    values: Float[Tensor, "B R"],
    old_values: Float[Tensor, "B R"],
    returns: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    *,
    value_clip_range: float,
) -> tuple[Float[Tensor, ""], ValueLossStats]:
    """Clipped squared error, summed: `0.5 max((V - G)^2, (clamp(V, V_old ± value_clip_range) - G)^2)`.

    OpenAI baselines' PPO2; Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO" (2403.17031).
    Statistics: number of tokens at which the clipped error decides.
    """
    values, old_values, returns = (torch.where(mask, part, 0.0) for part in (values, old_values, returns))
    limited = torch.minimum(torch.maximum(values, old_values - value_clip_range), old_values + value_clip_range)
    plain, clipped = (values - returns).square(), (limited - returns).square()
    with torch.no_grad():
        stats = ValueLossStats(clipped=((clipped > plain) & mask).sum().to(values.dtype))
    return 0.5 * masked_sum(torch.maximum(plain, clipped), mask), stats


def preference_loss(
    chosen: Float[Tensor, " B"],
    rejected: Float[Tensor, " B"],
    *,
    centering_coef: float = 0.0,
    margin: Float[Tensor, " B"] | None = None,
) -> tuple[Float[Tensor, ""], PreferenceLossStats]:
    """Pairwise loss of a reward model, summed over pairs, in fp32: `-log sigmoid(r+ - r- - margin) + c (r+ + r-)^2`.

    Bradley-Terry: Ouyang et al. 2022, equation 1; margin: Touvron et al. 2023, equation 2; centring term with
    c = `centering_coef`: Eisenstein et al. 2023. Statistics: pairs ranked rightly (a tie is not), sum of `r+ - r-`.
    """
    chosen, rejected = chosen.float(), rejected.float()
    difference = chosen - rejected
    ranked = -F.logsigmoid(difference if margin is None else difference - margin)
    centred = centering_coef * (chosen + rejected).square()
    stats = PreferenceLossStats(correct=(difference > 0).sum().float(), margin=difference.detach().sum())
    return (ranked + centred).sum(), stats


def dpo_loss(
    log_ratios: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    *,
    beta: float,
    label_smoothing: float = 0.0,
    kind: str = "sigmoid",
) -> tuple[Float[Tensor, ""], DpoStats]:
    """Loss of direct preference optimisation, summed over N / 2 pairs, in fp32.

    The first half of the rows are chosen answers, the second half their rejected ones; `log_ratios` is `log pi -
    log pi_ref` of each token, `mask` says which are the answer's. With h = chosen - rejected, each summed over its
    tokens: sigmoid is `-(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h)` (Rafailov et al. 2023, equation 7;
    eps = `label_smoothing`: Mitchell 2023). ipo is `(h - 1 / (2 beta))^2` with means over the tokens instead of sums
    (Azar et al. 2023, equation 17, as its authors corrected it for answers of different lengths). Raises ValueError for
    another kind.
    """
    totals = torch.where(mask, log_ratios.float(), 0.0).sum(dim=1)
    if kind == "ipo":
        totals = totals / mask.sum(dim=1).clamp(min=1)
    chosen, rejected = totals.chunk(2)
    difference = chosen - rejected
    if kind == "sigmoid":
        losses = -(1 - label_smoothing) * F.logsigmoid(beta * difference)
        losses = losses - label_smoothing * F.logsigmoid(-beta * difference)
    elif kind == "ipo":
        losses = (difference - 1 / (2 * beta)).square()
    else:
        raise ValueError(f"kind={kind}: there are sigmoid and ipo")
    stats = DpoStats(
        correct=(difference > 0).sum().float(),
        margin=beta * difference.detach().sum(),
        chosen=chosen.detach().sum(),
        rejected=rejected.detach().sum(),
    )
    return losses.sum(), stats


def sft_loss(logprobs: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, ""]:
    """Negative log-likelihood of the target tokens, summed, in nats: `-sum_t m_t log p_t`."""
    return -masked_sum(logprobs, mask)
