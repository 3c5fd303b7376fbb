"""An instruction, what it is about, and the answer, as in Stanford Alpaca."""

from rlhf.data.conversation import Message
from rlhf.data.formats import SHARED, BadRow, Cells, Draft, checked_text
from rlhf.data.messages import parsed

COLUMNS = {
    "instruction": "what is asked for",
    "input": "what it is about; may be empty or missing",
    "output": "the answer",
    "history": "earlier pairs of an instruction and its answer; may be empty or missing",
    **SHARED,
}


def read(row: Cells) -> Draft:
    """The input stands below the instruction, an empty line between them; earlier rounds before it."""
    row.need("instruction", "output")
    parts = [row.text("instruction")]
    if row.has("input") and (given := row.text("input", may_be_empty=True)).strip():
        parts.append(given)
    earlier = _history(row) if row.says("history") else ()
    messages = (*earlier, Message("user", "\n\n".join(parts)))
    return Draft(messages=messages, chosen=Message("assistant", row.text("output")), whole=bool(earlier))


def _history(row: Cells) -> tuple[Message, ...]:
    rounds, what = row.value("history"), row.named("history")
    try:
        rounds = parsed(rounds) if isinstance(rounds, str) else rounds
    except ValueError as error:
        raise BadRow(f"{what} must be a list of pairs: {error}") from None
    if not isinstance(rounds, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in rounds):
        raise BadRow(f"{what} must be a list of pairs, an instruction and its answer each")
    return tuple(
        Message(role, checked_text(text, f"{what}, pair {number}"))
        for number, pair in enumerate(rounds, 1)
        for role, text in zip(("user", "assistant"), pair, strict=True)
    )
