"""From sampled responses to scores and experience."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.batch import Rollout
from rlhf.functional.rewards import adjust_scores
from rlhf.rollout.forward import in_micro_batches, sequence_scores


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardModelScorer:
    """Scores of a reward model, normalised by the statistics stored with it, clipped, with a penalty for no EOS."""

    engine: Any
    mean: float
    std: float
    clip: float | None
    missing_eos_penalty: float
    micro_batch_size: int

    def raw(self, rollout: Rollout) -> Float[Tensor, " B"]:
        """The reward model's own numbers."""
        return in_micro_batches(
            lambda part: sequence_scores(self.engine, part.sequence_ids, part.attention_mask),
            rollout,
            micro_batch_size=self.micro_batch_size,
        )

    def __call__(self, rollout: Rollout, ended: Bool[Tensor, " B"]) -> Float[Tensor, " B"]:
        """The scores that PPO maximises."""
        return adjust_scores(
            self.raw(rollout),
            ended,
            mean=self.mean,
            std=self.std,
            clip=self.clip,
            missing_eos_penalty=self.missing_eos_penalty,
        )


def ended_with_eos(rollout: Rollout, *, eos_id: int) -> Bool[Tensor, " B"]:
    """Whether the last token of each response is EOS."""
    last = rollout.response_mask.long().sum(dim=1).clamp(min=1) - 1
    return rollout.response_ids.gather(1, last.unsqueeze(1)).squeeze(1) == eos_id


def response_texts(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The responses as text, without special tokens."""
    return [
        str(tokenizer.decode(ids[mask].tolist(), skip_special_tokens=True)).strip()
        for ids, mask in zip(rollout.response_ids.cpu(), rollout.response_mask.cpu(), strict=True)
    ]
