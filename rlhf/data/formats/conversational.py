"""One conversation as a list of messages: OpenAI's, TRL's, ShareGPT's."""

from rlhf.data.formats import LABEL, SHARED, Cells, Draft, checked_prompt

COLUMNS = {
    "messages": "messages of system, user, assistant and tool, the last one the assistant's",
    "conversations": "ShareGPT's name of them; may be missing",
    **LABEL,
    **SHARED,
}


def read(row: Cells) -> Draft:
    """The prompt is everything before the last message; every answer in it is as good as the last.

    One that is labelled as bad (LLaMA-Factory's KTO) is no demonstration.
    """
    name = "messages" if row.says("messages") or not row.says("conversations") else "conversations"
    row.need(name)
    row.judge()
    row.turns(name)  # Says what is wrong with them, a text among it.
    messages, answer = row.answer(name)
    prompt = checked_prompt(messages, f"{row.named(name)} without its last message")
    return Draft(messages=prompt, chosen=answer, whole=True)
