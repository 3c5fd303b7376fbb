"""What every data source yields."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class Struct(dict[str, Any]):
    """A mapping out of a table: what its row lacks of the keys that others have, the table has filled up with nulls."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: `role` is system, user, assistant or tool.

    `fields` is JSON of what else the chat template is given of it, such as tool_calls; a conversation's first message
    has its `tools` there, the functions that may be called. `learn` False: no loss on the turn, whatever data.loss_on
    says.
    """

    role: str
    content: str
    fields: str = ""
    learn: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """A prompt with the answers that are known for it.

    `messages` is the prompt and ends with a user's or a tool's turn. `chosen` is None where the row is a prompt only,
    `rejected` where there is no worse answer to compare with; their `fields` and whether to `learn` them are those of
    a Message. A plain text has no messages and is itself `chosen`. `whole`: the row is one conversation, of which every
    answer is as good as the last. `source` is the source's name in the mix, `where` says which row it was, in words for
    an error message. `extra` holds the columns that a scorer wants to see, `unread` names those that nobody read.
    """

    messages: tuple[Message, ...]
    chosen: str | None
    rejected: str | None
    source: str
    where: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    chosen_fields: str = ""
    rejected_fields: str = ""
    learn: bool = True
    learn_rejected: bool = True
    whole: bool = False
    unread: tuple[str, ...] = ()

    @property
    def prompt_text(self) -> str:
        """The prompt as a person reads it: the turns' contents, one per paragraph."""
        return "\n\n".join(message.content for message in self.messages)

    def answer(self, side: str) -> Message | None:
        """The chosen or the rejected answer as a message."""
        text, learn = getattr(self, side), self.learn if side == "chosen" else self.learn_rejected
        return None if text is None else Message("assistant", text, getattr(self, f"{side}_fields"), learn)


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A row that gives no conversation: where it is and why. A bad row stops the run unless bad rows are skipped."""

    source: str
    where: str
    reason: str
    bad: bool = True
