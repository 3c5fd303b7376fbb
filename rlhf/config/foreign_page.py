"""The tables of docs/from_deepspeed_chat.md, written from `foreign.py`: `python -m rlhf.config.foreign_page PAGE`."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from rlhf.config.foreign import DEEPSPEED_CHAT, Equivalent

_TABLE = re.compile(r"(<!-- flags: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: str) -> str:
    """The page with every table between `<!-- flags: SCRIPT -->` and `<!-- end -->` written anew.

    Raises ValueError for a page that does not have one table for each script.
    """
    found = [script for _, script, _ in _TABLE.findall(page)]
    if sorted(found) != sorted(DEEPSPEED_CHAT):
        raise ValueError(f"tables of {sorted(found)}, scripts {sorted(DEEPSPEED_CHAT)}")
    return _TABLE.sub(lambda match: f"{match[1]}\n{table(match[2])}\n{match[3]}", page)


def table(script: str) -> str:
    """A script's flags in its own order; those without an equivalent come last."""
    flags = sorted(DEEPSPEED_CHAT[script].items(), key=lambda entry: not entry[1].here)
    rows = [line for flag, equivalent in flags for line in _rows(flag, equivalent, script)]
    return "\n".join(["| flag | here | remarks |", "| --- | --- | --- |", *rows]) + "\n"


def _rows(flag: str, equivalent: Equivalent, script: str) -> Iterator[str]:
    note = equivalent.note.replace("{stage}", "stage")
    if not equivalent.here:
        yield f"| `{flag}` | none | {note} |"
        return
    for value in ("", *equivalent.values):
        given = value or equivalent.example
        # A boolean flag, or one whose value is another quantity here, has no value to show.
        shown = f"{flag} {given}" if value or "{" in equivalent.here.replace("{stage}", "") else flag
        remark = "the same" if value and note else note
        yield f"| `{shown}` | `{equivalent.arguments('stage', given or None)}` | {remark} |"


def main(arguments: list[str]) -> int:
    """Write the tables of the page that is named anew."""
    path = Path(arguments[0])
    path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
