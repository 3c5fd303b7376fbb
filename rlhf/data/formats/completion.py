"""A prompt with its answer, as texts or as lists of messages."""

from rlhf.data.formats import Cells, Draft

COLUMNS = {"prompt": "a text, or messages", "completion": "the answer: a text, or messages that end with it"}


def read(row: Cells) -> Draft:
    """There is nothing to compare the answer with."""
    return Draft(messages=row.prompt(), chosen=row.answer("completion"))
