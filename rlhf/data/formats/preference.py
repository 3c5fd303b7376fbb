"""A prompt with a better and a worse answer, as texts or as lists of messages (TRL's standard and conversational)."""

from rlhf.data.conversation import Message
from rlhf.data.formats import SHARED, Cells, Draft

COLUMNS = {
    "prompt": "a text, or messages; may be missing where chosen and rejected both begin with it",
    "chosen": "the better answer: a text, or messages that end with it",
    "rejected": "the worse answer, likewise",
    **SHARED,
}


def read(row: Cells) -> Draft:
    """Without a prompt column, the prompt is what the two conversations have in common, up to the user's last turn."""
    sides = ("chosen", "rejected")
    row.need(*sides)
    if not row.has("prompt") and not any(row.holds_turns(side) for side in sides):
        return _common(row)
    messages, (chosen, rejected) = row.answered(*sides)
    return Draft(messages=messages, chosen=chosen, rejected=rejected)


def _common(row: Cells) -> Draft:
    """Two texts that begin alike: the prompt is what they have in common, up to a space or a line's end, as TRL has it.

    The space is the answers', the line's end the prompt's.
    """
    chosen, rejected = row.text("chosen"), row.text("rejected")
    pairs = zip(chosen, rejected, strict=False)
    end = next((n for n, (one, other) in enumerate(pairs) if one != other), min(len(chosen), len(rejected)))
    if end < min(len(chosen), len(rejected)):
        space, line = chosen[:end].rfind(" "), chosen[:end].rfind("\n")
        end = max(space, line + 1, 0)
    prompt = chosen[:end]
    if not prompt.strip() or not chosen[end:].strip() or not rejected[end:].strip():
        row.value("prompt")  # Says that it is missing.
    chosen_answer, rejected_answer = (Message("assistant", text[end:]) for text in (chosen, rejected))
    return Draft(messages=(Message("user", prompt),), chosen=chosen_answer, rejected=rejected_answer)
