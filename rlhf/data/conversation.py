"""What every data source yields."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """A prompt with the answers that are known for it.

    `messages` is the prompt and ends with a user's turn. `chosen` is None where the row is a prompt only, `rejected`
    where there is no worse answer to compare with. A plain text has no messages and is itself `chosen`. `source` is
    the source's name in the mix, `where` says which row it was, in words for an error message. `extra` holds the
    columns that a scorer wants to see.
    """

    messages: tuple[Message, ...]
    chosen: str | None
    rejected: str | None
    source: str
    where: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt_text(self) -> str:
        """The prompt as a person reads it: the turns' contents, one per paragraph."""
        return "\n\n".join(message.content for message in self.messages)


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A row that gives no conversation: where it is and why. A bad row stops the run unless bad rows are skipped."""

    source: str
    where: str
    reason: str
    bad: bool = True
