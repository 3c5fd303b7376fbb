"""From what a scorer says of responses to the scores that are maximised: normalised, clipped, scaled, punished."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf.batch import PromptBatch, Rollout
from rlhf.functional.masking import masked_moments
from rlhf.functional.rewards import adjust_scores, repeated_share

Scorer = Callable[[PromptBatch, Rollout], Float[Tensor, " B"]]
"""Turns this rank's prompts and responses into one number each, fp32, on the rollout's device. Every rank calls it."""


@dataclass(kw_only=True, slots=True)
class RunningMoments:
    """Mean and variance of all scores seen so far, of all ranks (Chan et al. 1983). Its fields are its whole state."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    @property
    def std(self) -> float:
        """The standard deviation; 1 until two different scores were seen."""
        return (self.squares / self.count) ** 0.5 if self.count and self.squares > 0 else 1.0

    def update(self, values: Tensor, *, all_reduce: Callable[[Tensor], Tensor]) -> None:
        """Take in this rank's values; `all_reduce` sums over the ranks, which must all call.

        Values that are not finite are left out: one of them would stay in the mean for ever.
        """
        known = values.isfinite()
        count = float(all_reduce(known.sum(dtype=torch.float64).reshape(1)))
        if not count:
            return
        mean, variance = masked_moments(values.masked_fill(~known, 0.0), known, all_reduce=all_reduce)
        total = self.count + count
        shift = float(mean) - self.mean
        self.squares += float(variance) * count + shift**2 * self.count * count / total
        self.mean += shift * count / total
        self.count = total


@dataclass(kw_only=True, slots=True)
class ScoreShaping:
    """What is done to scores, in this order: normalise by the running moments (if there are any), clip, scale, punish.

    Penalties come after clipping, so that no score can hide them: for a missing EOS, for each token beyond
    `length_limit`, and for the share of the response's `repetition_ngram`-grams that occurred before in it.
    """

    clip: float | None
    scale: float
    missing_eos_penalty: float
    length_penalty: float
    length_limit: int
    repetition_penalty: float
    repetition_ngram: int
    running: RunningMoments | None = field(default=None)

    def __call__(
        self,
        scores: Float[Tensor, " B"],
        rollout: Rollout,
        ended: Bool[Tensor, " B"],
        *,
        all_reduce: Callable[[Tensor], Tensor],
    ) -> Float[Tensor, " B"]:
        """The shaped scores. Every rank must call."""
        mean, std = 0.0, 1.0
        if self.running is not None:
            self.running.update(scores, all_reduce=all_reduce)
            mean, std = self.running.mean, self.running.std
        shaped = adjust_scores(
            scores,
            ended,
            mean=mean,
            std=std,
            clip=self.clip,
            scale=self.scale,
            missing_eos_penalty=self.missing_eos_penalty,
        )
        if self.length_penalty:
            beyond = (rollout.response_mask.sum(dim=1) - self.length_limit).clamp(min=0)
            shaped = shaped - self.length_penalty * beyond
        if self.repetition_penalty:
            shares = repeated_share(rollout.response_ids, rollout.response_mask, ngram=self.repetition_ngram)
            shaped = shaped - self.repetition_penalty * shares
        return shaped
