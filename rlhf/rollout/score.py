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
from rlhf.models.tokenizer import encode_prompts
from rlhf.rollout.forward import in_groups, sequence_scores
from rlhf.rollout.grouping import equal_groups
from rlhf.rollout.scorers import ScoreFunction, checked_scores
from rlhf.rollout.shaping import Scorer


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardModelScorer:
    """A reward model's scores, less `mean` and divided by `std`.

    `reward_tokenizer` is the reward model's where it differs from the policy's `tokenizer`: the answers are then
    turned into text and encoded anew, through the reward model's own chat template.
    """

    engine: Any
    mean: float
    std: float
    micro_batch_size: int
    tokenizer: PreTrainedTokenizerBase
    reward_tokenizer: PreTrainedTokenizerBase | None

    def __call__(self, prompts: PromptBatch, rollout: Rollout) -> Float[Tensor, " B"]:
        """The scores of the responses to the prompts."""
        if self.reward_tokenizer is not None:
            raw = self._raw_of_text(prompts, rollout, self.reward_tokenizer)
        else:
            raw = in_groups(
                lambda part: sequence_scores(self.engine, part.sequence_ids, part.attention_mask),
                rollout,
                equal_groups(rollout.attention_mask.sum(dim=1), self.micro_batch_size),
            )
        return (raw - self.mean) / self.std

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


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightedScorer:
    """The weighted sum of several scorers: `sum_i weight_i score_i`."""

    members: tuple[tuple[float, Scorer], ...]

    def __call__(self, prompts: PromptBatch, rollout: Rollout) -> Float[Tensor, " B"]:
        """The sum for each response."""
        total = torch.zeros(len(rollout), device=rollout.sequence_ids.device)
        for weight, scorer in self.members:
            total = total + weight * scorer(prompts, rollout)
        return total


@dataclass(frozen=True, kw_only=True, slots=True)
class TextScorer:
    """A function of texts: `score(prompts, responses, **columns) -> list[float]`.

    The prompt is given as a person reads it: its turns' contents, one per paragraph. A column that not all of the rows
    have is None where it is missing.
    """

    function: ScoreFunction
    name: str
    tokenizer: PreTrainedTokenizerBase

    def __call__(self, prompts: PromptBatch, rollout: Rollout) -> Float[Tensor, " B"]:
        """One finite number for each response; DataError if the function gives anything else."""
        check_records(prompts, why=f"{self.name} needs the prompts' text")
        texts = ["\n\n".join(turn["content"] for turn in record["messages"]) for record in prompts.records]
        kept = dict.fromkeys(
            name for record in prompts.records for name in record if name not in ("messages", "source")
        )
        columns = {name: [record.get(name) for record in prompts.records] for name in kept}
        scores = checked_scores(self.function, texts, response_texts(rollout, self.tokenizer), columns, name=self.name)
        return torch.tensor(scores, dtype=torch.float32, device=rollout.sequence_ids.device)


def check_records(prompts: PromptBatch, *, why: str) -> None:
    """Raise ValueError if prompts come without the records that hold their text."""
    if len(prompts.records) != len(prompts):
        raise ValueError(f"PromptBatch.records is empty: {why}")


def encode_anew(
    prompts: PromptBatch, responses: list[str], ended: list[bool], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Token ids of prompts and responses under another tokenizer, with its EOS where the response had ended.

    Raises:
        ValueError: the prompts come without the records that hold their text.
    """
    check_records(prompts, why="a reward model with another tokenizer needs the prompts' text")
    turns = [[Message(**message) for message in record["messages"]] for record in prompts.records]
    encoded = tokenizer(responses, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [
        [*prompt, *response, *([int(tokenizer.eos_token_id)] if end else [])]
        for prompt, response, end in zip(encode_prompts(tokenizer, turns), encoded, ended, strict=True)
    ]


def ended_with_eos(rollout: Rollout, *, eos_id: int) -> Bool[Tensor, " B"]:
    """Whether each response came to its end: by EOS, its last token, or by what else ends one in its generation."""
    if rollout.ended is not None:
        return rollout.ended
    last = rollout.response_mask.long().sum(dim=1).clamp(min=1) - 1
    return rollout.response_ids.gather(1, last.unsqueeze(1)).squeeze(1) == eos_id


def response_texts(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The responses as text, without special tokens."""
    return [
        str(tokenizer.decode(ids[mask].tolist(), skip_special_tokens=True))
        for ids, mask in zip(rollout.response_ids.cpu(), rollout.response_mask.cpu(), strict=True)
    ]
