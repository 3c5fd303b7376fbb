"""A prompt with its answer, as texts or as lists of messages."""

from rlhf.data.formats import SHARED, Cells, Draft, DroppedRow

COLUMNS = {
    "prompt": "a text, or messages; may be missing where completion is a conversation",
    "completion": "the answer: a text, or messages that end with it",
    "label": "whether the answer is a good one (TRL's unpaired preferences); may be missing",
    **SHARED,
}


def read(row: Cells) -> Draft:
    """There is nothing to compare the answer with; one that is labelled as bad is no demonstration."""
    if row.says("label") and not row.flag("label"):
        raise DroppedRow("labelled as a bad answer")
    messages, (answer,) = row.answered("completion")
    return Draft(messages=messages, chosen=answer)
