"""A prompt with its answer, as texts or as lists of messages."""

from rlhf.data.formats import BadRow, Cells, Draft, DroppedRow

COLUMNS = {
    "prompt": "a text, or messages",
    "completion": "the answer: a text, or messages that end with it",
    "label": "whether the answer is a good one (TRL's unpaired preferences); may be missing",
}


def read(row: Cells) -> Draft:
    """There is nothing to compare the answer with; one that is labelled as bad is no demonstration."""
    if row.has("label"):
        label = row.value("label")
        if not isinstance(label, bool):
            raise BadRow(f"{row.named('label')} must be true or false, not {label!r:.40}")
        if not label:
            raise DroppedRow("labelled as a bad answer")
    return Draft(messages=row.prompt(), chosen=row.answer("completion"))
