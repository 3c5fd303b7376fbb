"""One conversation as a list of messages; its last answer is what is learnt."""

from rlhf.data.formats import Cells, Draft, checked_prompt

COLUMNS = {"messages": "messages of system, user and assistant, the last one the assistant's"}


def read(row: Cells) -> Draft:
    """The prompt is everything before the last message."""
    messages = checked_prompt(row.turns("messages")[:-1], f"{row.named('messages')} without its last message")
    return Draft(messages=messages, chosen=row.answer("messages"))
