"""Conversations as one text with marked turns: "\\n\\nHuman: … \\n\\nAssistant: …" (Anthropic's HH, Dahoas' sets).

`markers` of the source are the user's and the assistant's mark, with the line breaks that belong to them. One space or
line break behind a mark is the mark's, too; what is left of a turn is kept as it is. A line break may be CRLF.
"""

import re
from dataclasses import dataclass

from rlhf.data.conversation import Message
from rlhf.data.formats import BadRow, Cells, Draft, checked_prompt, joined, same_turns

COLUMNS = {
    "prompt": "the turns up to where the answer begins; may be missing where chosen is a whole transcript",
    "chosen": "the better answer, with or without the turns before it",
    "rejected": "the worse answer, likewise; may be missing",
}
MARKERS = ("\n\nHuman:", "\n\nAssistant:")


def read(row: Cells) -> Draft:
    """Without a prompt column, the prompt is chosen's turns but for the last; rejected must have the same."""
    row.need("chosen")
    marks = _marks(row)
    prompt, opened = _prompt(row, marks) if row.has("prompt") else ((), False)
    messages, chosen = _answered(row, "chosen", prompt, marks, opened=opened)
    what = row.named("prompt") if prompt else f"{row.named('chosen')} without its last turn"
    messages = checked_prompt(messages, what)
    if not row.says("rejected"):
        return Draft(messages=messages, chosen=chosen, whole=not prompt)
    others, rejected = _answered(row, "rejected", prompt, marks, opened=opened)
    if not same_turns(messages, others):
        raise BadRow("chosen and rejected must be the same conversation but for the last turn")
    return Draft(messages=messages, chosen=chosen, rejected=rejected)


@dataclass(frozen=True, slots=True)
class _Marks:
    user: str
    assistant: str

    @property
    def bare(self) -> tuple[str, str]:
        """The marks without white space around them."""
        return self.user.strip(), self.assistant.strip()

    def lead(self, text: str) -> str:
        """A text that begins with a mark, with the white space that belongs before it."""
        found = next((mark for mark in (self.user, self.assistant) if text.lstrip().startswith(mark.strip())), None)
        return text if found is None else found[: -len(found.lstrip())] + text.lstrip()

    def turns(self, text: str, what: str) -> list[Message]:
        """The turns of a text; the last one may be empty."""
        patterns = [re.escape(mark).replace("\\\n", "\r?\n") for mark in (self.user, self.assistant)]
        found = re.split("|".join(f"({pattern})" for pattern in patterns), self.lead(text))
        if len(found) < 4:
            raise BadRow(f"{what} has no turn that begins with {' or '.join(map(repr, self.bare))}")
        if found[0].strip():
            raise BadRow(f"{what} begins with text before the first {self.bare[0]!r}")
        said = [
            _said(text, self.user if by_user else self.assistant, last=number + 1 == len(found) // 3)
            for number, (by_user, text) in enumerate(zip(found[1::3], found[3::3], strict=True))
        ]
        return [
            Message("user" if by_user else "assistant", text) for by_user, text in zip(found[1::3], said, strict=True)
        ]

    def end(self, text: str) -> str:
        """What a prompt's last turn says, without the white space that belongs to the answer's mark."""
        lead = self.assistant[: -len(self.assistant.lstrip())]
        return text.removesuffix(lead).removesuffix(lead.replace("\n", "\r\n")) if lead else text.rstrip()


def _said(text: str, mark: str, *, last: bool) -> str:
    """What stands between two marks."""
    if not mark[-1].isspace():
        text = re.sub(r"^(?: |\r?\n)", "", text)
    # The space before the next mark is part of it where the marks do not say so themselves.
    return text if last or mark[0].isspace() else text.rstrip()


def _marks(row: Cells) -> _Marks:
    if not row.markers:
        return _Marks(*MARKERS)
    if len(row.markers) != 2 or not all(marker.strip() for marker in row.markers):
        raise BadRow("`markers` of the source must be two texts: the user's mark and the assistant's")
    return _Marks(*row.markers)


def _prompt(row: Cells, marks: _Marks) -> tuple[tuple[Message, ...], bool]:
    """The prompt's turns, and whether it ends with the assistant's mark, from which the answer goes on."""
    *turns, last = marks.turns(row.text("prompt"), row.named("prompt"))
    opened = last.role == "assistant" and not last.content.strip()
    if not opened:
        turns.append(Message(last.role, marks.end(last.content)))
    return _filled(turns, row.named("prompt")), opened and row.text("prompt").endswith(marks.bare[1])


def _filled(turns: list[Message], what: str) -> tuple[Message, ...]:
    if any(not turn.content.strip() for turn in turns):
        raise BadRow(f"{what} has an empty turn")
    return tuple(turns)


def _answered(
    row: Cells, name: str, prompt: tuple[Message, ...], marks: _Marks, *, opened: bool
) -> tuple[tuple[Message, ...], Message]:
    """What stands before an answer, the prompt included, and the answer."""
    text, what = row.text(name), row.named(name)
    if prompt and not text.lstrip().startswith(marks.bare):
        # A space that belongs to a mark is only there where the text goes on from one.
        space = " " if not opened and not marks.assistant[-1].isspace() else ""
        text = f"{marks.assistant}{space}{text}"
    *before, answer = marks.turns(text, what)
    if answer.role != "assistant":
        raise BadRow(f"{what} must end with the assistant's turn")
    if not answer.content.strip():
        raise BadRow(f"{what} has an empty last answer" if before else f"{what} is empty")
    return joined(prompt, _filled(before, what), what), answer
