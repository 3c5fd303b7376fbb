"""What every data source yields."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """A prompt with the answers that are known for it.

    `messages` is the prompt and ends with a user's turn. `chosen` is None where the row is a prompt only, `rejected`
    where there is no worse answer to compare with. `source` is the source's name in the mix, `where` says which row
    it was, in words for an error message.
    """

    messages: tuple[Message, ...]
    chosen: str | None
    rejected: str | None
    source: str
    where: str

    @property
    def prompt_text(self) -> str:
        """The prompt as a person reads it: the turns' contents, one per paragraph."""
        return "\n\n".join(message.content for message in self.messages)
