"""Shows a run's progress.jsonl on the terminal while it grows."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from rlhf.config.terminal import shown, steer

_PLAIN_INTERVAL = 10.0


class ProgressFollower:
    """Shows new lines of a progress.jsonl at every `poll()`.

    On a terminal transient lines overwrite each other; elsewhere one of them is shown every ten seconds.
    """

    def __init__(self, path: Path, stream: TextIO) -> None:
        self._path = path
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._offset = 0
        self._transient_shown = False
        self._last_plain = float("-inf")

    def poll(self) -> None:
        """Show what was appended since the last call."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                content = file.read()
        except OSError:
            return
        complete = content[: content.rfind(b"\n") + 1]
        self._offset += len(complete)
        entries = [*_entries(complete.decode("utf-8", errors="replace"))]
        for number, entry in enumerate(entries):
            if not entry["transient"]:
                self._permanent(entry["text"])
            elif number == len(entries) - 1 or not entries[number + 1]["transient"]:
                self._transient(entry["text"])
        self._stream.flush()

    def finish(self) -> None:
        """Show the rest and leave the cursor at the start of a line."""
        self.poll()
        if self._transient_shown:
            steer(self._stream, "\n")
            self._transient_shown = False
        self._stream.flush()

    def _permanent(self, text: str) -> None:
        steer(self._stream, f"\r\x1b[2K{shown(text)}\n" if self._transient_shown else f"{shown(text)}\n")
        self._transient_shown = False

    def _transient(self, text: str) -> None:
        if self._is_terminal:
            width = shutil.get_terminal_size().columns
            steer(self._stream, f"\r\x1b[2K{shown(text)[: width - 1]}")
            self._transient_shown = True
        elif time.monotonic() - self._last_plain >= _PLAIN_INTERVAL:
            self._last_plain = time.monotonic()
            steer(self._stream, f"{shown(text)}\n")


def _entries(text: str) -> Iterator[dict[str, Any]]:
    """The entries of complete lines. A line that a full disk has cut short is left out."""
    for line in text.split("\n"):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("text"), str):
            yield {"text": entry["text"], "transient": bool(entry.get("transient"))}
