"""One module per format: how a row's columns become a conversation. A module has these and needs no registration:

    COLUMNS: dict[str, str]                      the columns it reads, each with what is in it
    read(row: Cells) -> Draft                    raises BadRow, or DroppedRow for what is right but of no use

A source's `columns` says where another data set keeps a column: `{prompt: question.full_text}` finds it in a nested
mapping, a number counts in a list.
"""

import importlib
import pkgutil
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from rlhf.config.errors import ConfigError
from rlhf.config.schema import SourceConfig
from rlhf.data.conversation import Conversation, Message, Refused

_ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}
_ABSENT = object()


class BadRow(ValueError):
    """A row that is not what its format says; the message gives the reason."""


class DroppedRow(ValueError):
    """A row that is as it should be but of no use here; the message gives the reason, which rows have in common."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """What a format makes of a row."""

    messages: tuple[Message, ...] = ()
    chosen: str | None = None
    rejected: str | None = None


class Format(Protocol):
    """A module of this package."""

    COLUMNS: dict[str, str]

    def read(self, row: "Cells") -> Draft:
        """Turn a row into a prompt and its answers."""
        ...


@dataclass(frozen=True, slots=True)
class Cells:
    """The columns of a row, by the names that the format has for them."""

    row: Mapping[str, Any]
    columns: Mapping[str, str] = field(default_factory=dict)
    markers: tuple[str, ...] = ()

    def _value(self, name: str) -> Any:
        path = self.columns.get(name, name)
        if path in self.row:
            return self.row[path]
        value: Any = self.row
        for part in path.split("."):
            if isinstance(value, Mapping) and part in value:
                value = value[part]
            elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
                value = value[int(part)]
            else:
                return _ABSENT
        return value

    def named(self, name: str) -> str:
        """How a column is called in the row."""
        return f'"{self.columns.get(name, name)}"'

    def has(self, name: str) -> bool:
        """Whether a column is there and not null."""
        return self._value(name) is not _ABSENT and self._value(name) is not None

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
            raise BadRow(f"{self.named(name)} must be a number, not {_shown(value)}") from None
        if number != number or number in (float("inf"), float("-inf")):
            raise BadRow(f"{self.named(name)} must be a finite number, not {number}")
        return number

    def turns(self, name: str) -> tuple[Message, ...]:
        """A column that must be a list of messages, {"role", "content"} or {"from", "value"}."""
        value = self.value(name)
        if not isinstance(value, list) or not value:
            raise BadRow(f"{self.named(name)} must be a list of messages, not {_shown(value)}")
        return tuple(_message(entry, f"{self.named(name)}, message {number}") for number, entry in enumerate(value, 1))

    def holds_turns(self, name: str) -> bool:
        """Whether a column is a list."""
        return isinstance(self._value(name), list)

    def prompt(self, name: str = "prompt") -> tuple[Message, ...]:
        """A column that is one user's text, or a list of messages that ends with the user's."""
        if self.holds_turns(name):
            return checked_prompt(self.turns(name), self.named(name))
        return (Message("user", self.text(name)),)

    def answer(self, name: str) -> str:
        """A column that is the answer's text, or a list of messages that ends with it."""
        if not self.holds_turns(name):
            return self.text(name)
        *_, last = self.turns(name)
        if last.role != "assistant":
            raise BadRow(f"{self.named(name)} must end with the assistant's message, not the {last.role}'s")
        return last.content


def _shown(value: Any) -> str:
    return f"{value!r:.40}" if isinstance(value, int | float | str) else type(value).__name__


def checked_text(value: Any, what: str, *, may_be_empty: bool = False) -> str:
    """A text with something in it; raises BadRow."""
    if not isinstance(value, str):
        raise BadRow(f"{what} must be text, not {type(value).__name__}")
    if not may_be_empty and not value.strip():
        raise BadRow(f"{what} is empty")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise BadRow(f"{what} is not valid UTF-8: it holds half of a surrogate pair")
    return value


def _message(entry: Any, what: str) -> Message:
    if not isinstance(entry, Mapping):
        raise BadRow(f"{what} must be a mapping with role and content, not {type(entry).__name__}")
    role, content = entry.get("role", entry.get("from")), entry.get("content", entry.get("value"))
    if not isinstance(role, str):
        raise BadRow(f"{what} has no role")
    role = _ROLES.get(role.lower(), role.lower())
    if role not in ("system", "user", "assistant"):
        raise BadRow(f"{what} has the role {role!r}: must be system, user or assistant")
    return Message(role, checked_text(content, f"{what}: its content"))


def checked_prompt(messages: tuple[Message, ...], what: str) -> tuple[Message, ...]:
    """Messages that end with the user's, a system turn being first if there is one; raises BadRow."""
    if not messages or messages[-1].role != "user":
        last = f"ends with the {messages[-1].role}'s message" if messages else "has no message"
        raise BadRow(f"{what} {last}: a prompt must end with the user's")
    if any(message.role == "system" for message in messages[1:]):
        raise BadRow(f"{what} has a system message that is not the first")
    return messages


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
    chosen, rejected = (None if text is None else re.sub(pattern, "", text) for text in (draft.chosen, draft.rejected))
    for side, text in (("chosen", chosen), ("rejected", rejected)):
        if text is not None and not text.strip():
            raise BadRow(f"{side} is empty without what `remove` takes out of it")
    return replace(draft, chosen=chosen, rejected=rejected)


def _conversation(form: Format, row: Any, source: SourceConfig, *, name: str, where: str) -> Conversation:
    if not isinstance(row, Mapping):
        raise BadRow(f"must be an object with the columns {', '.join(form.COLUMNS)}, not {type(row).__name__}")
    cells = Cells(row, source.columns, tuple(source.markers))
    draft = _cleaned(form.read(cells), source.remove)
    if draft.rejected is not None and draft.chosen is not None and draft.chosen.strip() == draft.rejected.strip():
        raise BadRow("chosen and rejected are equal")
    return Conversation(
        messages=draft.messages,
        chosen=draft.chosen,
        rejected=draft.rejected,
        source=name,
        where=where,
        extra={column: cells.value(column) for column in source.keep},
    )
