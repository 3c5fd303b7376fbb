"""Whether the chat template and training agree on rows of every shape, and if not, what the template does otherwise.

Training joins the ids of a prompt, up to where the assistant begins, with those of an answer and its end. Programs that
use the model render whole conversations: both must be the same tokens.
"""

from dataclasses import dataclass, field
from typing import Any

from rlhf.config.errors import ConfigError
from rlhf.data.conversation import Conversation
from rlhf.models.template import end_of_turn, finder, special_tokens
from rlhf.models.tokenizer import template_agrees
from rlhf.models.turns import as_turns, render

Shape = tuple[bool | tuple[str, ...], ...]
_WITHOUT_ANSWER = "yes"


def disagreement(tokenizer: Any, conversation: Conversation) -> str | None:
    """What the template makes of a conversation that training does not, in words; None if they agree.

    Of a conversation that the template refuses nothing is known: None.
    """
    answer = _answer(conversation)
    if template_agrees(tokenizer, conversation.messages, answer):
        return None
    turns, tools = as_turns(conversation.messages)
    answered = [*turns, {"role": "assistant", "content": answer}]
    try:
        whole = render(tokenizer, (answered, tools), to_answer=False)
        bare = render(tokenizer, (turns, tools), to_answer=False)
        prompt = render(tokenizer, (turns, tools), to_answer=True)
    except ConfigError:
        return None
    behind = whole.removeprefix(prompt)
    if not whole.startswith(prompt):
        return _other_prompt(prompt, bare, whole, answer)
    if not behind.startswith(answer):
        return _other_answer(behind, answer, ignored=prompt == bare)
    tail, end = behind.removeprefix(answer), str(tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)))
    if not tail.startswith(end):
        return f"behind an answer the template writes {_quoted(tail)}, where training writes {end}"
    return "the tokenizer makes other tokens of the prompt and the answer together than of each by itself"


def _other_prompt(prompt: str, bare: str, whole: str, answer: str) -> str:
    """Why a conversation does not begin as its prompt does, generation prompt included."""
    if not whole.startswith(bare):
        return "the template writes former turns otherwise once an answer follows them"
    written, _, _ = whole.removeprefix(bare).partition(answer)
    opening = _quoted(prompt.removeprefix(bare))
    return f"the template's generation prompt is {opening}, but an answer stands behind {_quoted(written)}"


def _other_answer(behind: str, answer: str, *, ignored: bool) -> str:
    """Why what stands behind the prompt does not begin as the answer does."""
    written, there, _ = behind.partition(answer)
    if there and ignored:
        return f"the template writes no generation prompt, but {_quoted(written)} before an answer: a response lacks it"
    if there:
        return f"between the generation prompt and an answer the template writes {_quoted(written)}"
    if answer.strip() in behind:
        return "the template takes white space off an answer"
    return "the template changes the text of an answer"


def _quoted(text: str) -> str:
    shown = text if len(text) <= 60 else f"{text[:57]}…"
    return repr(shown) if text else "nothing"


def _answer(conversation: Conversation) -> str:
    # White space that a template takes off is the encoder's to tell: it counts the answers.
    return (conversation.chosen or _WITHOUT_ANSWER).strip()


@dataclass(slots=True)
class TemplateCheck:
    """Collects one conversation of every shape while they are read, and compares each at the end."""

    tokenizer: Any
    seen: dict[Shape, Conversation] = field(default_factory=dict)
    _holds_control: Any = None

    def add(self, conversation: Conversation) -> None:
        """Remember a conversation if it is the first of its shape: turns, control tokens, white space at the ends."""
        if not conversation.messages:
            return
        if self._holds_control is None:
            self._holds_control = finder(special_tokens(self.tokenizer))
        contents = [message.content for message in conversation.messages]
        answer = _answer(conversation)
        shape = (
            conversation.messages[0].role == "system",
            tuple(message.role for message in conversation.messages[-4:]),
            any(message.fields for message in conversation.messages),
            any(map(self._holds_control, contents)),
            self._holds_control(answer),
            any(text != text.strip() for text in contents),
            not all(contents),
        )
        self.seen.setdefault(shape, conversation)

    def findings(self) -> list[str]:
        """Each way in which template and training differ, with the first row of it and how many kinds have it."""
        causes: dict[str, list[Conversation]] = {}
        for conversation in self.seen.values():
            if cause := disagreement(self.tokenizer, conversation):
                causes.setdefault(cause, []).append(conversation)
        return [
            f"{cause} (in {len(rows)} of {len(self.seen)} kinds of rows, first in {rows[0].where})"
            for cause, rows in causes.items()
        ]
