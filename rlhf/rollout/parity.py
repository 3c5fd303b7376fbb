"""Whether generation and training give the same tokens the same probabilities."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf.engine.distributed import all_reduce_sum
from rlhf.functional.masking import masked_sum
from rlhf.tracking.metrics import MetricAccumulator


def compare(
    sampled: Float[Tensor, "B R"],
    computed: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    *,
    metrics: MetricAccumulator,
) -> float:
    """The mean difference, in nats per token over all ranks, of the log-probabilities with which tokens were sampled
    and those that training computes; noted as a metric, and the largest one beside it. Every rank must call."""
    differences = (sampled - computed).abs() * mask
    sums = torch.stack([masked_sum(differences, mask), mask.sum().float()])
    metrics.add("rollout/logprob_difference", sums[0], sums[1])
    metrics.maximum("rollout/largest_logprob_difference", differences.max())
    total, count = all_reduce_sum(sums).tolist()
    return float(total / max(count, 1.0))


def disagreement(mean: float, *, tolerance: float, iteration: int) -> str | None:
    """What to say of a mean difference, None if it is within the tolerance."""
    if mean <= tolerance:
        return None
    return (
        f"iteration {iteration}: generation and training differ by {mean:.3g} nats per token in the log-probabilities "
        f"of the same tokens, more than rollout.mismatch_tolerance={tolerance:g}"
    )
