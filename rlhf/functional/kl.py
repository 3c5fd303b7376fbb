"""Estimates of the divergence KL(policy || reference) from sampled tokens, and the controller of its coefficient.

With `r = p_reference / p_policy` of a token drawn from the policy, `log r = ref_logprobs - logprobs`. The three
estimators are those of J. Schulman, "Approximating KL Divergence" (2020). In the reward use k1; as a loss only the
gradient of k2 is that of the divergence.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

LOG_RATIO_LIMIT = 20.0


def kl_k1(logprobs: Float[Tensor, "*shape"], ref_logprobs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`-log r` per token, in nats: unbiased, may be negative."""
    return logprobs - ref_logprobs


def kl_k2(logprobs: Float[Tensor, "*shape"], ref_logprobs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`(log r)^2 / 2` per token, in nats: biased, never negative."""
    return 0.5 * (logprobs - ref_logprobs).square()


def kl_k3(logprobs: Float[Tensor, "*shape"], ref_logprobs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`r - 1 - log r` per token, in nats: unbiased, never negative. `log r` is held within ±20 so that r is finite."""
    log_ratio = (ref_logprobs - logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.expm1(log_ratio) - log_ratio


def per_sequence_kl(
    logprobs: Float[Tensor, "B R"], ref_logprobs: Float[Tensor, "B R"], response_mask: Bool[Tensor, "B R"]
) -> Float[Tensor, " B"]:
    """Divergence of whole responses, in nats: k1 summed over each response's tokens."""
    return torch.where(response_mask, kl_k1(logprobs, ref_logprobs), 0.0).sum(dim=1)


def adaptive_kl_coef(kl_coef: float, *, observed_kl: float, target: float, horizon: int, num_sequences: int) -> float:
    """The next KL coefficient: `kl_coef * (1 + e * num_sequences / horizon)`, `e = clip(observed / target - 1, ±0.2)`.

    `observed_kl` and `target` are in nats per sequence; `num_sequences` (all ranks) were seen since the last change.
    Proportional controller in log space of Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences",
    section 2.2.
    """
    error = min(max(observed_kl / target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * num_sequences / horizon)
