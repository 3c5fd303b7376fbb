"""A prompt with its answer, as texts or as lists of messages."""

from rlhf.data.formats import LABEL, SHARED, Cells, Draft

COLUMNS = {
    "prompt": "a text, or messages; may be missing where completion is a conversation",
    "completion": "the answer: a text, or messages that end with it",
    **LABEL,
    **SHARED,
}


def read(row: Cells) -> Draft:
    """There is nothing to compare the answer with; one that is labelled as bad is no demonstration."""
    row.need("completion", *(() if row.holds_turns("completion") else ("prompt",)))
    row.judge()
    messages, (answer,) = row.answered("completion")
    return Draft(messages=messages, chosen=answer)
