"""From texts to a batch of prompts, for scripts of a user's own."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.batch import PromptBatch
from rlhf.data.collate import pad
from rlhf.data.conversation import Message
from rlhf.data.messages import message
from rlhf.models.tokenizer import encode_prompts


def prompt_batch(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str | Sequence[Mapping[str, str]]], **columns: Sequence[Any]
) -> PromptBatch:
    """Prompts through the tokenizer's chat template, left-padded.

    Args:
        tokenizer: with a chat template and a padding token.
        prompts: B texts of a user, or lists of messages {"role", "content"} that end with the user's.
        columns: what a scorer is given beside the texts, B values each.

    Returns:
        prompt_ids and prompt_mask [B, P], and the records that hold the prompts' text.

    Raises:
        ValueError: a column has another number of values, or a message is none.
        ConfigError: the chat template fails.
    """
    turns = [
        (Message("user", given),) if isinstance(given, str) else tuple(message(turn, "a message") for turn in given)
        for given in prompts
    ]
    for name, values in columns.items():
        if len(values) != len(prompts):
            raise ValueError(f"{name} has {len(values)} values for {len(prompts)} prompts")
    prompt_ids, prompt_mask = pad(encode_prompts(tokenizer, turns), pad_id=int(tokenizer.pad_token_id), left=True)
    records = tuple(
        {"messages": [_record(turn) for turn in own], "source": ""}
        | {name: values[number] for name, values in columns.items()}
        for number, own in enumerate(turns)
    )
    return PromptBatch(prompt_ids=prompt_ids, prompt_mask=prompt_mask, records=records)


def _record(turn: Message) -> dict[str, str]:
    """A message as a record has it."""
    plain = {"role": turn.role, "content": turn.content}
    return {**plain, "fields": turn.fields} if turn.fields else plain
