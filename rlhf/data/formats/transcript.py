"""Conversations as one text with marked turns: "\\n\\nHuman: … \\n\\nAssistant: …" (Anthropic's HH, Dahoas' sets).

`markers` of the source are the user's and the assistant's mark, with the line breaks that belong to them.
"""

import re

from rlhf.data.conversation import Message
from rlhf.data.formats import BadRow, Cells, Draft, checked_prompt

COLUMNS = {
    "prompt": "the turns up to where the answer begins; may be missing where chosen is a whole transcript",
    "chosen": "the better answer, with or without the turns before it",
    "rejected": "the worse answer, likewise; may be missing",
}
MARKERS = ("\n\nHuman:", "\n\nAssistant:")


def read(row: Cells) -> Draft:
    """Without a prompt column, the prompt is chosen's turns but for the last; rejected must have the same."""
    if row.has("prompt"):
        prompt = _turns(row.text("prompt"), row.named("prompt"), markers=_markers(row))
        prompt = prompt[:-1] if prompt[-1].role == "assistant" and not prompt[-1].content else prompt
        messages = _checked(prompt, row.named("prompt"))
        rejected = _bare(row, "rejected", prompt) if row.has("rejected") else None
        return Draft(messages=messages, chosen=_bare(row, "chosen", prompt), rejected=rejected)
    *prompt, chosen = _answered(row, "chosen")
    messages = _checked(prompt, f"{row.named('chosen')} without its last turn")
    if not row.has("rejected"):
        return Draft(messages=messages, chosen=chosen.content)
    *other, worse = _answered(row, "rejected")
    if other != prompt:
        raise BadRow("chosen and rejected must be the same conversation but for the last turn")
    return Draft(messages=messages, chosen=chosen.content, rejected=worse.content)


def _markers(row: Cells) -> tuple[str, str]:
    if not row.markers:
        return MARKERS
    if len(row.markers) != 2 or not all(marker.strip() for marker in row.markers):
        raise BadRow("`markers` of the source must be two texts: the user's mark and the assistant's")
    return row.markers[0], row.markers[1]


def _turns(text: str, what: str, *, markers: tuple[str, str]) -> list[Message]:
    user, assistant = markers
    # A text that begins with a mark lacks the line breaks before it.
    lead = "" if text.startswith(markers) or not text.startswith(tuple(m.lstrip() for m in markers)) else "\n\n"
    found = re.split(f"({re.escape(user)}|{re.escape(assistant)})", lead + text)
    if len(found) < 3:
        raise BadRow(f"{what} has no turn that begins with {user.strip()!r} or {assistant.strip()!r}")
    if found[0].strip():
        raise BadRow(f"{what} begins with text before the first {user.strip()!r}")
    roles = {user: "user", assistant: "assistant"}
    return [Message(roles[mark], said.strip()) for mark, said in zip(found[1::2], found[2::2], strict=True)]


def _checked(turns: list[Message], what: str) -> tuple[Message, ...]:
    if any(not turn.content for turn in turns):
        raise BadRow(f"{what} has an empty turn")
    return checked_prompt(tuple(turns), what)


def _bare(row: Cells, name: str, prompt: list[Message]) -> str:
    """An answer without the mark, or the prompt's turns, that may stand before it."""
    if row.text(name).strip().startswith(_markers(row)[0].strip()):
        *before, answer = _answered(row, name)
        if before != prompt:
            raise BadRow(f"{row.named(name)} begins with other turns than {row.named('prompt')}")
        return answer.content
    text = row.text(name).strip().removeprefix(_markers(row)[1].strip()).strip()
    if not text:
        raise BadRow(f"{row.named(name)} is empty")
    return text


def _answered(row: Cells, name: str) -> list[Message]:
    turns = _turns(row.text(name), row.named(name), markers=_markers(row))
    if turns[-1].role != "assistant":
        raise BadRow(f"{row.named(name)} must end with the assistant's turn")
    if not turns[-1].content:
        raise BadRow(f"{row.named(name)} has an empty last answer")
    return turns
