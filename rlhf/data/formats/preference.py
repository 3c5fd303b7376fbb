"""A prompt with a better and a worse answer, as texts or as lists of messages (TRL's standard and conversational)."""

from rlhf.data.conversation import Message
from rlhf.data.formats import BadRow, Cells, Draft, checked_prompt

COLUMNS = {
    "prompt": "a text, or messages; may be missing where chosen and rejected both begin with it",
    "chosen": "the better answer: a text, or messages that end with it",
    "rejected": "the worse answer, likewise",
}


def read(row: Cells) -> Draft:
    """Without a prompt column, the prompt is what the two conversations have in common, up to the user's last turn."""
    if not row.has("prompt") and not row.holds_turns("chosen") and row.has("chosen") and row.has("rejected"):
        return _common(row)
    if row.has("prompt") or not row.holds_turns("chosen"):
        return Draft(messages=row.prompt(), chosen=row.answer("chosen"), rejected=row.answer("rejected"))
    chosen, rejected = row.turns("chosen"), row.turns("rejected")
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("chosen and rejected must be the same conversation but for the last message")
    messages = checked_prompt(chosen[:-1], f"{row.named('chosen')} without its last message")
    return Draft(messages=messages, chosen=row.answer("chosen"), rejected=row.answer("rejected"))


def _common(row: Cells) -> Draft:
    """Two texts that begin alike: the prompt is what they have in common, up to a space, as TRL has it."""
    chosen, rejected = row.text("chosen"), row.text("rejected")
    pairs = zip(chosen, rejected, strict=False)
    end = next((n for n, (one, other) in enumerate(pairs) if one != other), min(len(chosen), len(rejected)))
    if end < min(len(chosen), len(rejected)):
        end = max(chosen[:end].rfind(" "), chosen[:end].rfind("\n")) + 1
    prompt = chosen[:end].strip()
    if not prompt or not chosen[end:].strip() or not rejected[end:].strip():
        row.value("prompt")  # Says that it is missing.
    return Draft(messages=(Message("user", prompt),), chosen=chosen[end:], rejected=rejected[end:])
