"""Conversations to rows of token ids: what a worker process does with a chunk of them."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf.config.errors import ConfigError
from rlhf.config.schema import DataConfig, LossOn
from rlhf.data.conversation import Conversation, Message
from rlhf.data.split import STAGES, Part, canonical, part_of, uniform
from rlhf.models.targets import answer_spans, encode_answer, shows_fields
from rlhf.models.tokenizer import encode_prompts, encode_responses, encode_texts
from rlhf.models.turns import render, unread_keys

Row = dict[str, Any]
# What is remembered of every row while the parts are put in order: 40 bytes.
META = np.dtype(
    [
        ("source", "i2"),
        ("tokens", "i4"),
        ("pair", "?"),
        ("free", "?"),
        ("digest", "u8"),
        ("identity", "u8"),
        ("choose", "f8"),
        ("order", "f8"),
    ]
)
LEFT_OUT = "beyond the source's fraction"
BAD_ROW = "bad row"
_UNSUITABLE = ("sft: no answer", "rm: no rejected answer")
_NO_TARGET = "sft: no answer that is to be learnt (weight 0)"
REWRITTEN = "conversations that the chat template rewrites as they go on: each answer is a row of its own"
OPENING = "conversations that the assistant opens: its first turn answers nothing and is not learnt"
SPACED_CALL = "answers with calls and white space around their text, which the chat template takes away"
SPACED = "answers with white space around them, which the chat template takes away: they are learnt as they are"


@dataclass(slots=True)
class Encoded:
    """What became of a chunk: rows by part with what is remembered of them, and what was dropped or truncated.

    `unread` counts the rows that have something which nobody read, `notes` what else a person should know of.
    """

    rows: dict[str, list[Row]] = field(default_factory=dict)
    meta: dict[str, list[tuple[Any, ...]]] = field(default_factory=dict)
    read: Counter[str] = field(default_factory=Counter)
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)
    truncated: Counter[tuple[str, str]] = field(default_factory=Counter)
    unread: Counter[tuple[str, str]] = field(default_factory=Counter)
    notes: Counter[tuple[str, str]] = field(default_factory=Counter)
    problems: list[Row] = field(default_factory=list)

    def note(self, kind: str, conversation: Conversation, part: Part, detail: str = "") -> None:
        """List a row among the problems."""
        entry = {"problem": kind, "part": part.label, "source": conversation.source, "where": conversation.where}
        # Of the many that a fraction leaves out, where they are is enough.
        prompt = {} if kind == LEFT_OUT else {"prompt": conversation.prompt_text[:2000]}
        self.problems.append({**entry, **prompt, "detail": detail})

    def meta_array(self, label: str) -> NDArray[Any]:
        """What is remembered of a part's rows, [rows] of META."""
        return np.array(self.meta[label], dtype=META)


def prompt_digest(conversation: Conversation) -> int:
    """64 bits that stand for a prompt, or for a plain text."""
    return _digest(canonical(conversation.messages) or conversation.chosen)


def _digest(value: Any) -> int:
    return int.from_bytes(hashlib.blake2b(json.dumps(value).encode(), digest_size=8).digest(), "big")


@dataclass(slots=True)
class Encoder:
    """Tokenises chunks of conversations and decides what each row is good for."""

    data: DataConfig
    tokenizer: Any
    _known: list[bool] = field(default_factory=list)
    # The last conversation and its digest: a long text is in thousands of rows.
    _last: tuple[Conversation, int] | None = None

    def _digest_of(self, conversation: Conversation) -> int:
        if self._last is None or self._last[0] is not conversation:
            self._last = conversation, prompt_digest(conversation)
        return self._last[1]

    def encode(self, conversations: Sequence[Conversation]) -> Encoded:
        """Rows of a chunk by part; rows that cannot be used are counted and listed."""
        found = Encoded()
        kept: list[tuple[Part, Conversation]] = []
        for conversation in conversations:
            found.read[conversation.source] += 1
            found.unread.update((conversation.source, name) for name in conversation.unread)
            source = self.data.sources[conversation.source]
            part = part_of(conversation, self.data.split, stages=source.stages)
            if source.fraction < 1.0 and not self._is_picked(conversation, source.fraction):
                found.dropped[conversation.source, LEFT_OUT] += 1
                found.note(LEFT_OUT, conversation, part)
            elif part.stage == "ptx":
                self._add_text(found, part, conversation)
            else:
                kept.append((part, conversation))
        self._add_turns(found, kept)
        return found

    def _is_picked(self, conversation: Conversation, fraction: float) -> bool:
        return uniform(f"fraction {self.data.split.seed} {prompt_digest(conversation)}") < fraction

    def _add_text(self, found: Encoded, part: Part, conversation: Conversation) -> None:
        """A plain text in pieces of at most the longest sequence; the last one ends with EOS."""
        (ids,) = encode_texts(self.tokenizer, [conversation.chosen or ""])
        longest = self.data.max_prompt_length + self.data.max_response_length
        blank, pieces = self._blank(conversation), range(0, len(ids), longest)
        for number, start in enumerate(pieces, start=1):
            own = ids[start : start + longest]
            where = f"{conversation.where}, piece {number}" if len(pieces) > 1 else conversation.where
            text = self.tokenizer.decode(own, skip_special_tokens=True)
            piece = {"prompt_ids": [], "chosen_ids": own, "chosen_text": text, "where": where}
            self._append(found, part, conversation, {**blank, **piece})

    def _add_turns(self, found: Encoded, items: Sequence[tuple[Part, Conversation]]) -> None:
        prompts = self._prompts(list({conversation.messages: None for _, conversation in items}))
        plain = [c.answer(side) for _, c in items for side in ("chosen", "rejected")]
        texts = list({answer.content: None for answer in plain if answer is not None})
        answers = dict(zip(texts, encode_responses(self.tokenizer, texts), strict=True))
        for part, conversation in items:
            try:
                unread = self._unread(conversation)
                conversation = self._as_shown(conversation)
                ids = self._ids(found, conversation, prompts[conversation.messages], answers)
            except ConfigError as error:
                found.dropped[conversation.source, BAD_ROW] += 1
                found.note(BAD_ROW, conversation, part, str(error))
                continue
            found.unread.update((conversation.source, key if key == "tools" else f"messages[].{key}") for key in unread)
            if self._fits(found, part, conversation, ids["prompt"]):
                self._add_row(found, part, conversation, ids)

    def _fits(self, found: Encoded, part: Part, conversation: Conversation, prompt: list[int]) -> bool:
        """Whether a prompt is short enough; counted and listed if it is not."""
        if len(prompt) <= self.data.max_prompt_length:
            return True
        found.dropped[conversation.source, "prompt too long"] += 1
        found.note("prompt too long", conversation, part, f"{len(prompt)} tokens")
        return False

    def _as_shown(self, conversation: Conversation) -> Conversation:
        """Answers without keys of which the template shows nothing: they must not change what is learnt."""
        hidden: dict[str, Any] = {}
        for side in ("chosen", "rejected"):
            answer = conversation.answer(side)
            if answer is not None and not shows_fields(self.tokenizer, conversation.messages, answer):
                hidden[f"{side}_fields"] = ""
        return replace(conversation, **hidden) if hidden else conversation

    def _ids(
        self,
        found: Encoded,
        conversation: Conversation,
        prompt: list[int] | str,
        answers: Mapping[str, list[int]],
    ) -> dict[str, list[int]]:
        """Token ids of the prompt and the answers; raises ConfigError with what the template makes impossible."""
        if isinstance(prompt, str):
            raise ConfigError(prompt)
        ids = {"prompt": prompt}
        for side in ("chosen", "rejected"):
            answer = conversation.answer(side)
            if answer is None:
                continue
            if answer.fields:
                ids[side] = encode_answer(self.tokenizer, conversation.messages, answer)
            else:
                ids[side] = answers[answer.content]
            edged = answer.content != answer.content.strip()
            if side == "chosen" and edged and self._strips:
                found.notes[conversation.source, SPACED_CALL if answer.fields else SPACED] += 1
        return ids

    def _unread(self, conversation: Conversation) -> list[str]:
        """Keys of messages that the template does not show; raises ConfigError where nothing is left of a message."""
        sides = [conversation.answer(side) for side in ("chosen", "rejected")]
        messages = [*conversation.messages, *(answer for answer in sides if answer is not None)]
        if not any(message.fields for message in messages):
            return []
        unread = unread_keys(self.tokenizer, messages)
        if "tool_calls" in unread and any(not one.content and "tool_calls" in one.fields for one in messages):
            raise ConfigError(
                "a message is nothing but tool_calls, which the chat template does not show: set model.chat_template "
                "to one that does"
            )
        return unread

    @property
    def _strips(self) -> bool:
        """Whether the template takes away white space around an answer."""
        if not self._known:
            turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "  \ue000  "}]
            try:
                self._known.append("  \ue000  " not in render(self.tokenizer, (turns, None), to_answer=False))
            except ConfigError:
                self._known.append(False)
        return self._known[0]

    def _prompts(self, unique: list[tuple[Message, ...]]) -> dict[tuple[Message, ...], list[int] | str]:
        """Each prompt's ids, or why the chat template makes nothing of it."""
        try:
            return dict(zip(unique, encode_prompts(self.tokenizer, unique), strict=True))
        except ConfigError:
            found: dict[tuple[Message, ...], list[int] | str] = {}
            for messages in unique:
                try:
                    (found[messages],) = encode_prompts(self.tokenizer, [messages])
                except ConfigError as error:
                    found[messages] = str(error)
            return found

    def _add_row(self, found: Encoded, part: Part, conversation: Conversation, ids: Mapping[str, list[int]]) -> None:
        """Give a row to its stage. Every stage is evaluated on the held-out prompts, and none is trained on them."""
        limited = self.data.sources[conversation.source].stages or STAGES
        stages = [stage for stage in STAGES if stage in limited] if part.held_out else [part.stage]
        refused: dict[Part, str] = {}
        for use in (Part(stage, part.held_out) for stage in stages):
            row = self._row(found, use, conversation, ids)
            if reason := getattr(self, f"_add_{use.stage}")(found, use, conversation, row):
                refused[use] = reason
        for use, reason in refused.items():
            # What a held-out row lacks for one stage's evaluation is no loss if another one uses it.
            if reason not in _UNSUITABLE or len(refused) == len(stages):
                found.dropped[conversation.source, reason] += 1
                found.note(reason, conversation, use)

    def _blank(self, conversation: Conversation) -> Row:
        return {
            "source": conversation.source,
            "where": conversation.where,
            "prompt_text": conversation.prompt_text,
            "messages": [
                {key: getattr(one, key) for key in ("role", "content", "fields")} for one in conversation.messages
            ],
            "extra": json.dumps(conversation.extra, default=str) if conversation.extra else None,
            "prompt_targets": [],
            "answer_is_target": True,
            "chosen_truncated": False,
            **_no_rejected(),
        }

    def _row(self, found: Encoded, part: Part, conversation: Conversation, ids: Mapping[str, list[int]]) -> Row:
        row: Row = {**self._blank(conversation), "prompt_ids": ids["prompt"]}
        limit = self.data.max_response_length
        for side in ("chosen", "rejected"):
            answer, own = conversation.answer(side), ids.get(side)
            is_long = own is not None and len(own) > limit
            text = None if answer is None else answer.content
            if answer is not None and answer.fields and own is not None:
                text = self.tokenizer.decode(own[:-1], skip_special_tokens=False)
            row |= {f"{side}_text": text, f"{side}_truncated": is_long}
            # A truncated answer keeps no EOS: it did not end there.
            row[f"{side}_ids"] = own[:limit] if own is not None else None
            # PPO reads no answers.
            if is_long and own is not None and part.stage != "ppo":
                found.truncated[conversation.source, f"{part.label} {side}"] += 1
                found.note(f"{side} answer truncated", conversation, part, f"{len(own)} tokens")
        return row

    def _add_sft(self, found: Encoded, part: Part, conversation: Conversation, row: Row) -> str | None:
        if row["chosen_ids"] is None:
            return "sft: no answer"
        spans = self._earlier(conversation, row["prompt_ids"])
        if spans is None:
            self._add_each(found, part, conversation)
        targets = [place for span in spans or () for place in span]
        row = {**row, "prompt_targets": targets, "answer_is_target": conversation.learn}
        if conversation.learn or targets:
            self._append(found, part, conversation, {**row, **_no_rejected()})
        rejected = self.data.sft_on_rejected and row["rejected_ids"] is not None and conversation.learn_rejected
        if rejected:
            chosen = {f"chosen_{key}": row[f"rejected_{key}"] for key in ("ids", "text", "truncated")}
            chosen["answer_is_target"] = True
            self._append(found, part, conversation, {**row, **chosen, **_no_rejected(), "prompt_targets": []})
        return None if conversation.learn or targets or rejected or spans is None else _NO_TARGET

    def _earlier(self, conversation: Conversation, prompt_ids: list[int]) -> list[tuple[int, int]] | None:
        """Where the loss is on answers within the prompt; None if they have to be learnt as rows of their own."""
        wanted = self.data.loss_on
        if wanted is LossOn.last or (wanted is LossOn.auto and not conversation.whole):
            return []
        if not any(one.role == "assistant" and one.learn for one in conversation.messages):
            return []
        return answer_spans(self.tokenizer, conversation.messages, prompt_ids)

    def _add_each(self, found: Encoded, part: Part, conversation: Conversation) -> None:
        """A row for each earlier answer, behind the prompt that it answers: of the part of the whole conversation."""
        found.notes[conversation.source, REWRITTEN] += 1
        for number, one in enumerate(conversation.messages):
            if one.role != "assistant" or not one.learn:
                continue
            if not any(before.role in ("user", "tool") for before in conversation.messages[:number]):
                found.notes[conversation.source, OPENING] += 1
                continue
            own = replace(
                conversation,
                messages=conversation.messages[:number],
                chosen=one.content,
                chosen_fields=one.fields,
                rejected=None,
                rejected_fields="",
                learn=True,
                where=f"{conversation.where}, message {number + 1}",
            )
            try:
                (prompt,) = encode_prompts(self.tokenizer, [own.messages])
                ids = {"prompt": prompt, "chosen": encode_answer(self.tokenizer, own.messages, one)}
            except ConfigError as error:
                found.dropped[conversation.source, BAD_ROW] += 1
                found.note(BAD_ROW, own, part, str(error))
                continue
            if self._fits(found, part, own, prompt):
                self._append(found, part, own, self._row(found, part, own, ids))

    def _add_rm(self, found: Encoded, part: Part, conversation: Conversation, row: Row) -> str | None:
        if row["rejected_ids"] is None:
            return "rm: no rejected answer"
        if not conversation.learn or not conversation.learn_rejected:
            return "rm: an answer of weight 0"
        if row["chosen_ids"] == row["rejected_ids"]:
            return "rm: both answers equal"
        if row["chosen_truncated"] or row["rejected_truncated"]:
            # The score is read at EOS, which a truncated answer does not have.
            return "rm: an answer is truncated"
        self._append(found, part, conversation, row)
        return None

    def _add_ppo(self, found: Encoded, part: Part, conversation: Conversation, row: Row) -> None:
        self._append(found, part, conversation, row)

    def _append(self, found: Encoded, part: Part, conversation: Conversation, row: Row) -> None:
        found.rows.setdefault(part.label, []).append(row)
        source = self.data.sources[conversation.source]
        tokens = len(row["chosen_ids"] or ()) + len(row["rejected_ids"] or ())
        meta = (
            list(self.data.sources).index(conversation.source),
            tokens,
            row["rejected_ids"] is not None,
            not source.stages,
            self._digest_of(conversation),
            # Without its source: what two sources have in common is learnt once.
            _digest([canonical(conversation.messages), row["chosen_text"], row["rejected_text"]]),
            _hash_of_row("choose", row),
            _hash_of_row("order", row),
        )
        found.meta.setdefault(part.label, []).append(meta)


def _no_rejected() -> Row:
    return {"rejected_ids": None, "rejected_text": None, "rejected_truncated": False}


def _hash_of_row(purpose: str, row: Row) -> float:
    return uniform(
        json.dumps([purpose, *(row[key] for key in ("prompt_text", "chosen_text", "rejected_text", "source"))])
    )
