"""What of a conversation the loss is on: the answers within a prompt, and answers that the template writes itself.

Imports no torch.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from rlhf.config.errors import ConfigError
from rlhf.models.template import end_of_turn, special_tokens
from rlhf.models.tokenizer import encode_prompts, encode_response
from rlhf.models.turns import as_turns, named_fields, render, token_ids

Span = tuple[int, int]
# As transformers finds it.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def shows_fields(tokenizer: Any, messages: Sequence[Any], answer: Any) -> bool:
    """Whether the template shows anything of what an answer has beside its text; raises ConfigError where it fails."""
    if not answer.fields:
        return False
    bare = replace(answer, fields="")
    with_fields, without = (render(tokenizer, as_turns([*messages, one]), to_answer=False) for one in (answer, bare))
    return with_fields != without


def encode_answer(tokenizer: Any, messages: Sequence[Any], answer: Any) -> list[int]:
    """Token ids of an answer through its end: its text, or what the template makes of one with tool calls and the like.

    Raises ConfigError where the template does not put such an answer behind its prompt.
    """
    if not shows_fields(tokenizer, messages, answer):
        return encode_response(tokenizer, answer.content)
    shown = answer.content + named_fields(tokenizer, as_turns([answer]))
    if any(token in shown for token in special_tokens(tokenizer)):
        raise ConfigError("a control token stands in an answer with tool calls or the like, as text")
    prompt = render(tokenizer, as_turns(messages), to_answer=True)
    whole = render(tokenizer, as_turns([*messages, answer]), to_answer=False)
    if not whole.startswith(prompt):
        raise ConfigError("the chat template changes the prompt where an answer with tool calls or the like follows it")
    end = end_of_turn(tokenizer)
    said, written = whole[len(prompt) :], str(tokenizer.convert_ids_to_tokens(end))
    said = said.rpartition(written)[0] if written in said else said
    return [*token_ids(tokenizer, [said])[0], end]


def answer_spans(tokenizer: Any, messages: Sequence[Any], ids: Sequence[int]) -> list[Span] | None:
    """Where in a prompt's token ids the assistant's earlier answers are, [start, end), one for each that is learnt.

    The template's own marks say it where there are any, else each answer is looked for behind the prompt that it
    answers. None: the template shows an earlier answer otherwise than it was given, so that it cannot be learnt here.
    """
    answers = [number for number, one in enumerate(messages) if one.role == "assistant"]
    if not answers:
        return []
    try:
        spans = _marked(tokenizer, messages, answers, ids)
        spans = _by_prefixes(tokenizer, messages, answers, ids) if spans is None else spans
    except ConfigError:
        return None  # A template may refuse a part of what it takes as a whole.
    if spans is None:
        return None
    return [span for span, number in zip(spans, answers, strict=True) if messages[number].learn]


def _marked(tokenizer: Any, messages: Sequence[Any], answers: Sequence[int], ids: Sequence[int]) -> list[Span] | None:
    """By the template's {% generation %}: None without it, or where it does not mark each answer once and as it is."""
    turns, tools = as_turns(messages)
    template = tokenizer.get_chat_template(tools=tools)
    if not tokenizer.is_fast or not _GENERATION.search(template):
        return None
    encoded = tokenizer.apply_chat_template(
        turns, tools=tools, add_generation_prompt=True, return_assistant_tokens_mask=True, return_dict=True
    )
    if list(encoded["input_ids"]) != list(ids):
        return None  # Control tokens that stand in a message are plain text in `ids`.
    spans, position = [], 0
    for marked, run in groupby(encoded["assistant_masks"]):
        length = len(list(run))
        if marked:
            spans.append((position, position + length))
        position += length
    if len(spans) != len(answers):
        return None
    texts = tokenizer.batch_decode([list(ids[start:end]) for start, end in spans])
    said = [messages[number].content for number in answers]
    return spans if all(one in text for one, text in zip(said, texts, strict=True)) else None


def _by_prefixes(
    tokenizer: Any, messages: Sequence[Any], answers: Sequence[int], ids: Sequence[int]
) -> list[Span] | None:
    """An answer begins where its own prompt ends, and has the tokens that it would have as the last one.

    That is exactly what is learnt where the conversation ends there. None where one of them has other tokens.
    """
    if answers[0] == 0:
        return None
    spans = []
    for number, prompt in zip(answers, encode_prompts(tokenizer, [messages[:n] for n in answers]), strict=True):
        start, own = len(prompt), encode_answer(tokenizer, messages[:number], messages[number])
        if list(ids[:start]) != prompt or list(ids[start : start + len(own)]) != own:
            return None
        spans.append((start, start + len(own)))
    return spans
