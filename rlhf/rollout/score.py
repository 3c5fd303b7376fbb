"""From sampled responses to scores and experience."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import compress
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.batch import PromptBatch, Rollout
from rlhf.config.errors import DataError
from rlhf.data.collate import pad
from rlhf.data.conversation import Message
from rlhf.models.score_rule import ScoreRule, closed, end_id
from rlhf.models.template import end_of_turn, response_ends, special_ids
from rlhf.models.tokenizer import encode_prompts, encode_responses
from rlhf.rollout.forward import sequence_scores
from rlhf.rollout.grouping import equal_groups
from rlhf.rollout.scorers import ScoreFunction, checked_scores
from rlhf.rollout.shaping import Scorer


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardModelScorer:
    """A reward model's scores, less `rule.mean` and divided by `rule.std`.

    Answers that came to their end are closed as the model's chat template does it, `rule.tail` included; those that
    were cut off are scored at their last token (`scorer.missing_eos_penalty` is for them). `reward_tokenizer` is the
    reward model's where it differs from the policy's `tokenizer`: the answers are then turned into text and encoded
    anew, through the reward model's own chat template.
    """

    engine: Any
    rule: ScoreRule
    micro_batch_size: int
    tokenizer: PreTrainedTokenizerBase
    reward_tokenizer: PreTrainedTokenizerBase | None

    def __call__(self, prompts: PromptBatch, rollout: Rollout) -> Float[Tensor, " B"]:
        """The scores of the responses to the prompts."""
        tokenizer = self.reward_tokenizer or self.tokenizer
        ended = ended_with_eos(rollout, ends=response_ends(self.tokenizer)).tolist()
        if self.reward_tokenizer is not None:
            sequences = encode_anew(prompts, response_texts(rollout, self.tokenizer), ended, self.reward_tokenizer)
        else:
            rows = zip(rollout.sequence_ids.tolist(), rollout.attention_mask.tolist(), strict=True)
            sequences = [list(compress(ids, mask)) for ids, mask in rows]
        eos_id = end_id(tokenizer)
        close = partial(closed, eos_id=eos_id, ends=special_ids(tokenizer) - {eos_id}, tail=self.rule.tail)
        sequences = [close(ids) if end else ids for ids, end in zip(sequences, ended, strict=True)]
        raw = self._raw(sequences, pad_id=int(tokenizer.pad_token_id), device=rollout.sequence_ids.device)
        return (raw - self.rule.mean) / self.rule.std

    @torch.no_grad()
    def _raw(self, sequences: list[list[int]], *, pad_id: int, device: torch.device) -> Float[Tensor, " B"]:
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        self._check_length(int(lengths.max()))
        raw = torch.empty(len(sequences), device=device)
        for group in equal_groups(lengths, self.micro_batch_size):
            ids, mask = (part.to(device) for part in pad([sequences[row] for row in group.tolist()], pad_id=pad_id))
            raw[group.to(device)] = sequence_scores(self.engine, ids, mask)
        return raw

    def _check_length(self, longest: int) -> None:
        limit = getattr(self.engine.module.classifier.config, "max_position_embeddings", None)
        if limit is not None and longest > limit:
            raise DataError(
                f"an answer with its prompt takes {longest} tokens of the reward model, with what its chat template "
                f"writes behind the answer, but it has {limit} positions: lower data.max_prompt_length or "
                "data.max_response_length"
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
    """Token ids of prompts and responses under another tokenizer, with its end where the response had ended.

    Raises:
        ValueError: the prompts come without the records that hold their text.
    """
    check_records(prompts, why="a reward model with another tokenizer needs the prompts' text")
    turns = [[Message(**message) for message in record["messages"]] for record in prompts.records]
    return [
        [*prompt, *(response if end else response[:-1])]
        for prompt, response, end in zip(
            encode_prompts(tokenizer, turns), encode_responses(tokenizer, responses), ended, strict=True
        )
    ]


def ended_with_eos(rollout: Rollout, *, ends: Sequence[int]) -> Bool[Tensor, " B"]:
    """Whether each response came to its end: what generated it knows, or else its last token is among the `ends`."""
    if rollout.ended is not None:
        return rollout.ended
    last = rollout.response_mask.long().sum(dim=1, keepdim=True).clamp(min=1) - 1
    return torch.isin(rollout.response_ids.gather(1, last).squeeze(1), torch.tensor(ends, device=last.device))


def response_texts(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The responses as text, without special tokens, and without their end if that is no special one."""
    end = end_of_turn(tokenizer)
    rows = [
        ids[mask].tolist() for ids, mask in zip(rollout.response_ids.cpu(), rollout.response_mask.cpu(), strict=True)
    ]
    return [str(tokenizer.decode(ids[:-1] if ids[-1:] == [end] else ids, skip_special_tokens=True)) for ids in rows]
