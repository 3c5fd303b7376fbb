"""From sampled responses to scores and experience."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.batch import PromptBatch, Rollout
from rlhf.config.errors import DataError
from rlhf.data.collate import pad
from rlhf.data.conversation import Message
from rlhf.functional.rewards import adjust_scores
from rlhf.models.tokenizer import encode_prompts
from rlhf.rollout.forward import in_micro_batches, sequence_scores


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardModelScorer:
    """Scores of a reward model, normalised by the statistics stored with it, clipped, with a penalty for no EOS.

    `reward_tokenizer` is the reward model's where it differs from the policy's `tokenizer`: the answers are then
    turned into text and encoded anew, through the reward model's own chat template.
    """

    engine: Any
    mean: float
    std: float
    clip: float | None
    missing_eos_penalty: float
    micro_batch_size: int
    tokenizer: PreTrainedTokenizerBase
    reward_tokenizer: PreTrainedTokenizerBase | None

    def raw(self, prompts: PromptBatch, rollout: Rollout) -> Float[Tensor, " B"]:
        """The reward model's own numbers for the responses to the prompts."""
        if self.reward_tokenizer is not None:
            return self._raw_of_text(prompts, rollout, self.reward_tokenizer)
        return in_micro_batches(
            lambda part: sequence_scores(self.engine, part.sequence_ids, part.attention_mask),
            rollout,
            micro_batch_size=self.micro_batch_size,
        )

    def __call__(self, prompts: PromptBatch, rollout: Rollout, ended: Bool[Tensor, " B"]) -> Float[Tensor, " B"]:
        """The scores that PPO maximises."""
        return adjust_scores(
            self.raw(prompts, rollout),
            ended,
            mean=self.mean,
            std=self.std,
            clip=self.clip,
            missing_eos_penalty=self.missing_eos_penalty,
        )

    @torch.no_grad()
    def _raw_of_text(
        self, prompts: PromptBatch, rollout: Rollout, reward_tokenizer: PreTrainedTokenizerBase
    ) -> Float[Tensor, " B"]:
        ended = ended_with_eos(rollout, eos_id=int(self.tokenizer.eos_token_id))
        sequences = encode_anew(prompts, response_texts(rollout, self.tokenizer), ended.tolist(), reward_tokenizer)
        self._check_length(max(len(sequence) for sequence in sequences))
        device = rollout.sequence_ids.device
        ids, mask = (part.to(device) for part in pad(sequences, pad_id=int(reward_tokenizer.pad_token_id)))
        size = self.micro_batch_size
        parts = zip(torch.split(ids, size), torch.split(mask, size), strict=True)
        return torch.cat([sequence_scores(self.engine, part_ids, part_mask) for part_ids, part_mask in parts])

    def _check_length(self, longest: int) -> None:
        limit = getattr(self.engine.module.classifier.config, "max_position_embeddings", None)
        if limit is not None and longest > limit:
            raise DataError(
                f"an answer with its prompt takes {longest} tokens of the reward model's tokenizer, but that model has "
                f"{limit} positions: lower data.max_prompt_length or data.max_response_length"
            )


def encode_anew(
    prompts: PromptBatch, responses: list[str], ended: list[bool], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Token ids of prompts and responses under another tokenizer, with its EOS where the response had ended.

    Raises:
        ValueError: the prompts come without the records that hold their text.
    """
    if len(prompts.records) != len(prompts):
        raise ValueError("PromptBatch.records is empty: a reward model with another tokenizer needs the prompts' text")
    turns = [[Message(**message) for message in record["messages"]] for record in prompts.records]
    encoded = tokenizer(responses, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [
        [*prompt, *response, *([int(tokenizer.eos_token_id)] if end else [])]
        for prompt, response, end in zip(encode_prompts(tokenizer, turns), encoded, ended, strict=True)
    ]


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
