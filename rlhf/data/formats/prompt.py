"""A prompt without an answer, for PPO."""

from rlhf.data.formats import SHARED, Cells, Draft

COLUMNS = {"prompt": "a text, or messages", **SHARED}


def read(row: Cells) -> Draft:
    """The answer is for the policy to give."""
    return Draft(messages=row.prompt())
