"""An instruction, what it is about, and the answer, as in Stanford Alpaca."""

from rlhf.data.conversation import Message
from rlhf.data.formats import Cells, Draft

COLUMNS = {
    "instruction": "what is asked for",
    "input": "what it is about; may be empty or missing",
    "output": "the answer",
    "system": "a system message; may be empty or missing",
}


def read(row: Cells) -> Draft:
    """The input stands below the instruction, an empty line between them."""
    parts = [row.text("instruction")]
    if row.has("input") and (given := row.text("input", may_be_empty=True).strip()):
        parts.append(given)
    system = row.text("system", may_be_empty=True).strip() if row.has("system") else ""
    first = (Message("system", system),) if system else ()
    return Draft(messages=(*first, Message("user", "\n\n".join(parts))), chosen=row.text("output"))
