"""Plain text, for the pretraining mix of PPO."""

from rlhf.data.conversation import Message
from rlhf.data.formats import Cells, Draft

COLUMNS = {"text": "the text"}


def read(row: Cells) -> Draft:
    """No chat template is put around it."""
    return Draft(chosen=Message("assistant", row.text("text")))
