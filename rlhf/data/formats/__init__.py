"""One module per format: how a row's columns become a conversation. A module has these and needs no registration:

    COLUMNS: dict[str, str]                      the columns it reads, each with what is in it
    read(row: Cells) -> Draft                    raises BadRow, or DroppedRow for what is right but of no use

A format of messages has the columns in SHARED as well; they are read here.

A source's `columns` says where another data set keeps a column: `{prompt: question.full_text}` finds it in a nested
mapping, a number counts in a list.
"""

import importlib
import pkgutil
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Protocol

from rlhf.config.errors import ConfigError
from rlhf.config.schema import SourceConfig
from rlhf.data.conversation import Conversation, Message, Refused
from rlhf.data.messages import BadRow as BadRow
from rlhf.data.messages import checked_text as checked_text
from rlhf.data.messages import is_empty, message, message_list, shown, tool_list, with_tools

SHARED = {
    "system": "a system message before the others; may be missing",
    "tools": "the functions that may be called, as OpenAI lists them; may be missing",
}
LABEL = {"label": "whether the answer is a good one (unpaired preferences, KTO); may be missing"}
_ABSENT = object()
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_YES, _NO = ("true", "1", "1.0", "yes"), ("false", "0", "0.0", "no")


class DroppedRow(ValueError):
    """A row that is as it should be but of no use here; the message gives the reason, which rows have in common."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """What a format makes of a row: its prompt and answers. `whole`: it is one conversation, all of which is good."""

    messages: tuple[Message, ...] = ()
    chosen: Message | None = None
    rejected: Message | None = None
    whole: bool = False


class Format(Protocol):
    """A module of this package."""

    COLUMNS: dict[str, str]

    def read(self, row: "Cells") -> Draft:
        """Turn a row into a prompt and its answers."""
        ...


@dataclass(frozen=True, slots=True)
class Cells:
    """The columns of a row, by the names that the format has for them; `read` are those that were looked at."""

    row: Mapping[str, Any]
    columns: Mapping[str, str] = field(default_factory=dict)
    markers: tuple[str, ...] = ()
    read: set[str] = field(default_factory=set)

    def _value(self, name: str) -> Any:
        path = self.columns.get(name, name)
        if path in self.row:
            self.read.add(path)
            return self.row[path]
        value: Any = self.row
        for part in path.split("."):
            if isinstance(value, Mapping) and part in value:
                value = value[part]
            elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
                value = value[int(part)]
            else:
                return _ABSENT
        self.read.add(path)
        return value

    def named(self, name: str) -> str:
        """How a column is called in the row."""
        return f'"{self.columns.get(name, name)}"'

    def has(self, name: str) -> bool:
        """Whether a column is there and not null."""
        return self._value(name) is not _ABSENT and self._value(name) is not None

    def says(self, name: str) -> bool:
        """Whether a column is there with something in it; what is missing in a row of CSV is an empty text."""
        return self._value(name) is not _ABSENT and not is_empty(self._value(name))

    def need(self, *names: str) -> None:
        """Raise BadRow for a column that is missing: a format asks first, so that no fault of another one hides it."""
        for name in names:
            self.value(name)

    def value(self, name: str) -> Any:
        """A column that must be there and not null."""
        found = self._value(name)
        if found is _ABSENT:
            there = ", ".join(str(key) for key in list(self.row)[:12])
            raise BadRow(f"the column {self.named(name)} is missing (there are: {there or 'none'})")
        if found is None:
            raise BadRow(f"{self.named(name)} is null")
        return found

    def text(self, name: str, *, may_be_empty: bool = False) -> str:
        """A column that must be a text."""
        return checked_text(self.value(name), self.named(name), may_be_empty=may_be_empty)

    def number(self, name: str) -> float:
        """A column that must be a finite number; a text that reads as one is taken."""
        value = self.value(name)
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise BadRow(f"{self.named(name)} must be a number, not {shown(value)}") from None
        if number != number or number in (float("inf"), float("-inf")):
            raise BadRow(f"{self.named(name)} must be a finite number, not {number}")
        return number

    def flag(self, name: str) -> bool:
        """A column that must be true or false, or the text or number that tables write for it."""
        value = self.value(name)
        word = str(value).strip().lower() if isinstance(value, bool | int | float | str) else ""
        if word not in (*_YES, *_NO):
            raise BadRow(f"{self.named(name)} must be true or false, not {shown(value)}")
        return word in _YES

    def judge(self, name: str = "label") -> None:
        """Raise DroppedRow where a column says that the answer is a bad one, or is there and says nothing."""
        found = self._value(name)
        if found is _ABSENT:
            return
        if is_empty(found):
            raise DroppedRow(f"{self.named(name)} is null or empty, so nobody says that the answer is a good one")
        try:
            good = self.flag(name)
        except BadRow as bad:
            raise BadRow(f"{bad}: if it is no judgement, let columns.{name} name a column that is not there") from None
        if not good:
            raise DroppedRow("labelled as a bad answer")

    def turns(self, name: str) -> tuple[Message, ...]:
        """A column that must be a list of messages, {"role", "content"} or {"from", "value"}, or its JSON."""
        value = self.value(name)
        found = message_list(value, self.named(name))
        if not found:
            raise BadRow(f"{self.named(name)} must be a list of messages, not {shown(value)}")
        return tuple(message(entry, f"{self.named(name)}, message {number}") for number, entry in enumerate(found, 1))

    def holds_turns(self, name: str) -> bool:
        """Whether a column is a list, or messages written out as text."""
        return self.has(name) and message_list(self._value(name), self.named(name)) is not None

    def opening(self, name: str = "prompt") -> tuple[Message, ...]:
        """A column that is one user's text, or a list of messages."""
        return self.turns(name) if self.holds_turns(name) else (Message("user", self.text(name)),)

    def prompt(self, name: str = "prompt") -> tuple[Message, ...]:
        """A column that is one user's text, or a list of messages that ends with the user's."""
        return checked_prompt(self.opening(name), self.named(name))

    def answer(self, name: str) -> tuple[tuple[Message, ...], Message]:
        """A column that is the answer's text, or a list of messages that ends with it: what is before it, and it."""
        if not self.holds_turns(name):
            return (), Message("assistant", self.text(name))
        *before, last = self.turns(name)
        if last.role != "assistant":
            raise BadRow(f"{self.named(name)} must end with the assistant's message, not the {last.role}'s")
        return tuple(before), last

    def answered(self, *names: str) -> tuple[tuple[Message, ...], list[Message]]:
        """The prompt and the answers in these columns, which must be answers to the same.

        Messages before an answer that repeat the column "prompt" are checked against it; others go on from it. The
        column may be missing where all the answers are messages.
        """
        self.need(*names)
        all_turns = all(self.holds_turns(name) for name in names)
        if not all_turns:
            self.need("prompt")
        opening = self.opening() if self.has("prompt") or not all_turns else ()
        found = [self.answer(name) for name in names]
        prompts = [joined(opening, before, self.named(name)) for (before, _), name in zip(found, names, strict=True)]
        if any(not same_turns(prompts[0], other) for other in prompts[1:]):
            raise BadRow(f"{' and '.join(names)} must be the same conversation but for the last message")
        what = self.named("prompt") if opening else f"{self.named(names[0])} without its last message"
        return checked_prompt(prompts[0], what), [answer for _, answer in found]

    def unread(self) -> tuple[str, ...]:
        """The columns with something in them that nobody looked at, as they may be printed; parts of one by a path."""
        return tuple(repr(path)[1:-1] for path in self._unread(self.row, ""))

    def _unread(self, value: Any, before: str) -> Iterator[str]:
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, entry in items:
            path = f"{before}{key}"
            if path in self.read or is_empty(entry):
                continue
            if isinstance(entry, Mapping | list) and any(one.startswith(f"{path}.") for one in self.read):
                yield from self._unread(entry, f"{path}.")
            else:
                yield path


def same_turns(some: Sequence[Message], others: Sequence[Message], *, spacing: bool = True) -> bool:
    """Whether messages are equal, whatever their weights.

    Without `spacing` also where white space around differs, or only one of two has further keys.
    """

    def same(one: Message, other: Message) -> bool:
        if spacing:
            return (one.role, one.content, one.fields) == (other.role, other.content, other.fields)
        fields_agree = one.fields == other.fields or not one.fields or not other.fields
        return one.role == other.role and one.content.strip() == other.content.strip() and fields_agree

    return len(some) == len(others) and all(same(*pair) for pair in zip(some, others, strict=True))


def joined(prompt: tuple[Message, ...], before: tuple[Message, ...], what: str) -> tuple[Message, ...]:
    """A prompt and the messages that stand before an answer in a column: they repeat it, or go on from it.

    A system message may be in one of them alone. Raises BadRow where they contradict each other.
    """
    if not prompt or not before:
        return prompt or before
    system, asked = _divided(prompt)
    other_system, turns = _divided(before)
    if system and other_system and not same_turns(system, other_system, spacing=False):
        raise BadRow(f'{what} has another system message than "prompt"')
    system = system or other_system
    if same_turns(asked, turns[: len(asked)], spacing=False):
        # Of two that are the same the one that says more is taken.
        return (*system, *(_fuller(*pair) for pair in zip(asked, turns, strict=False)), *turns[len(asked) :])
    if same_turns(asked[-len(turns) :], turns, spacing=False) or not turns:
        return (*system, *asked)
    if same_turns(turns[-len(asked) :], asked, spacing=False):
        return (*system, *turns)
    if turns[0].role == "assistant" or (turns[0].role == "user" and asked[-1].role == "assistant"):
        return (*system, *asked, *turns)
    raise BadRow(f'{what} begins with other turns than "prompt"')


def _divided(messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """A system message in front, and the rest."""
    count = int(bool(messages) and messages[0].role == "system")
    return messages[:count], messages[count:]


def _fuller(one: Message, other: Message) -> Message:
    return other if other.fields or not other.learn else one


def checked_prompt(messages: tuple[Message, ...], what: str) -> tuple[Message, ...]:
    """Messages that end with the user's or a tool's, a system turn first if there is one; raises BadRow."""
    if not messages or messages[-1].role not in ("user", "tool"):
        last = f"ends with the {messages[-1].role}'s message" if messages else "has no message"
        raise BadRow(f"{what} {last}: a prompt must end with the user's")
    if any(message.role == "system" for message in messages[1:]):
        raise BadRow(f"{what} has a system message that is not the first")
    return messages


@cache
def format_names() -> list[str]:
    """The names of the modules in this package."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def format_module(name: str, *, key: str) -> Format:
    """Import a format; `key` is the configuration key to blame if there is none."""
    if name not in format_names():
        raise ConfigError(f"{key}={name}: no such format; there are {', '.join(format_names())}")
    module: Any = importlib.import_module(f"{__name__}.{name}")
    return module  # type: ignore[no-any-return]


def conversations(
    rows: Iterable[tuple[str, Any] | Refused], source: SourceConfig, *, name: str
) -> Iterator[Conversation | Refused]:
    """Turn rows, each with where it is, into conversations; what a source could not read is passed on."""
    form = format_module(source.format, key=f"data.sources.{name}.format")
    for entry in rows:
        if isinstance(entry, Refused):
            yield entry
            continue
        where, row = entry
        try:
            yield _conversation(form, row, source, name=name, where=where)
        except DroppedRow as dropped:
            yield Refused(source=name, where=where, reason=str(dropped), bad=False)
        except BadRow as bad:
            yield Refused(source=name, where=where, reason=str(bad))


def _cleaned(draft: Draft, pattern: str | None) -> Draft:
    """A draft whose answers lack what the pattern finds."""
    if pattern is None:
        return draft
    for side in ("chosen", "rejected"):
        answer = getattr(draft, side)
        if answer is not None and answer.content:
            text = re.sub(pattern, "", answer.content)
            if not text.strip():
                raise BadRow(f"{side} is empty without what `remove` takes out of it")
            draft = replace(draft, **{side: replace(answer, content=text)})
    return draft


def _with_shared(draft: Draft, cells: Cells, form: Format) -> Draft:
    """A draft with the system message and the tools that stand in columns of their own."""
    messages = draft.messages
    if "system" in form.COLUMNS and cells.says("system") and (text := cells.text("system", may_be_empty=True)).strip():
        system, rest = _divided(messages)
        if system and not same_turns(system, (Message("system", text),), spacing=False):
            raise BadRow(f"{cells.named('system')} is another system message than that of the messages")
        messages = (*(system or (Message("system", text),)), *rest)
    if "tools" in form.COLUMNS and cells.has("tools") and messages:
        tools = tool_list(cells.value("tools"), cells.named("tools"))
        if tools is None:
            cells.read.discard(cells.columns.get("tools", "tools"))  # Of another kind: nobody reads it.
        else:
            messages = with_tools(messages, tools, cells.named("tools"))
    return replace(draft, messages=messages)


def _check_is_text(cells: Cells, source: SourceConfig) -> None:
    """Raise BadRow for a row with pictures, sound or films: what its text says of them could not be learnt."""
    for column in _MEDIA:
        if not is_empty(cells.row.get(column)) and column not in (*cells.read, *source.keep):
            raise BadRow(
                f'"{column}" is not empty: only text can be learnt (take the column out if the text needs none)'
            )


def _conversation(form: Format, row: Any, source: SourceConfig, *, name: str, where: str) -> Conversation:
    if not isinstance(row, Mapping):
        needed = ", ".join(name for name in form.COLUMNS if name not in SHARED)
        raise BadRow(f"must be an object with the columns {needed}, not {type(row).__name__}")
    cells = Cells(row, source.columns, tuple(source.markers))
    draft = _with_shared(_cleaned(form.read(cells), source.remove), cells, form)
    _check_is_text(cells, source)
    chosen, rejected = draft.chosen, draft.rejected
    if chosen is not None and rejected is not None and same_turns([chosen], [rejected]):
        raise BadRow("chosen and rejected are equal")
    extra = {column: cells.value(column) for column in source.keep}
    return Conversation(
        messages=draft.messages,
        chosen=None if chosen is None else chosen.content,
        rejected=None if rejected is None else rejected.content,
        chosen_fields="" if chosen is None else chosen.fields,
        rejected_fields="" if rejected is None else rejected.fields,
        learn=chosen is None or chosen.learn,
        learn_rejected=rejected is None or rejected.learn,
        whole=draft.whole,
        source=name,
        where=where,
        extra=extra,
        unread=cells.unread(),
    )
