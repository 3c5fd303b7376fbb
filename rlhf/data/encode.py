"""Conversations to rows of token ids: what a worker process does with a chunk of them."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf.config.errors import ConfigError
from rlhf.config.schema import DataConfig
from rlhf.data.conversation import Conversation, Message
from rlhf.data.split import STAGES, Part, canonical, part_of, uniform
from rlhf.models.tokenizer import encode_prompts, encode_responses, encode_texts

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


@dataclass(slots=True)
class Encoded:
    """What became of a chunk: rows by part with what is remembered of them, and what was dropped or truncated."""

    rows: dict[str, list[Row]] = field(default_factory=dict)
    meta: dict[str, list[tuple[Any, ...]]] = field(default_factory=dict)
    read: Counter[str] = field(default_factory=Counter)
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)
    truncated: Counter[tuple[str, str]] = field(default_factory=Counter)
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
        texts = list({t.strip(): None for _, c in items for t in (c.chosen, c.rejected) if t is not None})
        answers = dict(zip(texts, encode_responses(self.tokenizer, texts), strict=True))
        for part, conversation in items:
            prompt_ids = prompts[conversation.messages]
            if isinstance(prompt_ids, str):
                found.dropped[conversation.source, BAD_ROW] += 1
                found.note(BAD_ROW, conversation, part, prompt_ids)
                continue
            if len(prompt_ids) > self.data.max_prompt_length:
                found.dropped[conversation.source, "prompt too long"] += 1
                found.note("prompt too long", conversation, part, f"{len(prompt_ids)} tokens")
                continue
            self._add_row(found, part, conversation, prompt_ids, answers)

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

    def _add_row(
        self,
        found: Encoded,
        part: Part,
        conversation: Conversation,
        prompt_ids: list[int],
        answers: dict[str, list[int]],
    ) -> None:
        """Give a row to its stage. Every stage is evaluated on the held-out prompts, and none is trained on them."""
        limited = self.data.sources[conversation.source].stages or STAGES
        stages = [stage for stage in STAGES if stage in limited] if part.held_out else [part.stage]
        refused: dict[Part, str] = {}
        for use in (Part(stage, part.held_out) for stage in stages):
            row = self._row(found, use, conversation, prompt_ids, answers)
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
            "messages": [asdict(message) for message in conversation.messages],
            "extra": json.dumps(conversation.extra, default=str) if conversation.extra else None,
            "chosen_truncated": False,
            **_no_rejected(),
        }

    def _row(
        self,
        found: Encoded,
        part: Part,
        conversation: Conversation,
        prompt_ids: list[int],
        answers: dict[str, list[int]],
    ) -> Row:
        row: Row = {**self._blank(conversation), "prompt_ids": prompt_ids}
        limit = self.data.max_response_length
        for side, text in (("chosen", conversation.chosen), ("rejected", conversation.rejected)):
            stripped = None if text is None else text.strip()
            ids = None if stripped is None else answers[stripped]
            is_long = ids is not None and len(ids) > limit
            row |= {f"{side}_text": stripped, f"{side}_truncated": is_long}
            # A truncated answer keeps no EOS: it did not end there.
            row[f"{side}_ids"] = ids[:limit] if ids is not None else None
            # PPO reads no answers.
            if is_long and ids is not None and part.stage != "ppo":
                found.truncated[conversation.source, f"{part.label} {side}"] += 1
                found.note(f"{side} answer truncated", conversation, part, f"{len(ids)} tokens")
        return row

    def _add_sft(self, found: Encoded, part: Part, conversation: Conversation, row: Row) -> str | None:
        if row["chosen_ids"] is None:
            return "sft: no answer"
        self._append(found, part, conversation, {**row, **_no_rejected()})
        if self.data.sft_on_rejected and row["rejected_ids"] is not None:
            chosen = {f"chosen_{key}": row[f"rejected_{key}"] for key in ("ids", "text", "truncated")}
            self._append(found, part, conversation, {**row, **chosen, **_no_rejected()})
        return None

    def _add_rm(self, found: Encoded, part: Part, conversation: Conversation, row: Row) -> str | None:
        if row["rejected_ids"] is None:
            return "rm: no rejected answer"
        if row["chosen_text"] == row["rejected_text"]:
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
