"""A prompt with a better and a worse answer, as texts or as lists of messages (TRL's standard and conversational)."""

from rlhf.data.formats import BadRow, Cells, Draft, checked_prompt

COLUMNS = {
    "prompt": "a text, or messages; may be missing where chosen and rejected are whole conversations",
    "chosen": "the better answer: a text, or messages that end with it",
    "rejected": "the worse answer, likewise",
}


def read(row: Cells) -> Draft:
    """Without a prompt column, the prompt is what the two conversations have in common, up to the user's last turn."""
    if row.has("prompt") or not row.holds_turns("chosen"):
        return Draft(messages=row.prompt(), chosen=row.answer("chosen"), rejected=row.answer("rejected"))
    chosen, rejected = row.turns("chosen"), row.turns("rejected")
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("chosen and rejected must be the same conversation but for the last message")
    messages = checked_prompt(chosen[:-1], f"{row.named('chosen')} without its last message")
    return Draft(messages=messages, chosen=row.answer("chosen"), rejected=row.answer("rejected"))
