"""Rows of local files: JSON Lines, JSON, CSV, Parquet and Arrow, the text ones also gzipped.

Every reader yields (where, row), or `Refused` for a row that cannot be read; a file that cannot be read on raises
DataError. No row is longer than `limit` bytes, and memory is bounded by a few times that, whatever a file holds.
"""

import csv
import io
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from rlhf.config.errors import DataError
from rlhf.config.terminal import shown_name
from rlhf.data.conversation import Refused
from rlhf.data.json_rows import json_rows
from rlhf.data.row_files import has_ending
from rlhf.data.tables import arrow_rows, parquet_rows
from rlhf.data.text_files import Rows, bad_row, open_text, too_long

_PIECE = 1024**2


def suffixes() -> list[str]:
    """The endings of the files that can be read."""
    return [*(f"{suffix}{zipped}" for suffix in _TEXT for zipped in ("", ".gz")), *_BINARY]


def can_read(path: Path) -> bool:
    """Whether a file's name has one of the endings, in capitals or not."""
    return has_ending(path.name, suffixes())


def read_rows(path: Path, *, source: str, limit: int) -> Rows:
    """The rows of a file by its ending, none of them longer than `limit` bytes."""
    name = path.name.lower().removesuffix(".gz")
    reader = next(read for suffix, read in {**_TEXT, **_BINARY}.items() if name.endswith(suffix))
    try:
        for entry in reader(path, limit):
            yield replace(entry, source=source) if isinstance(entry, Refused) else entry
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"{shown_name(path)} cannot be read: {reason}") from error


class _Lines:
    """The lines of a CSV file for its reader, which may take several for one row; `number` counts them."""

    def __init__(self, file: IO[str], limit: int) -> None:
        self._file, self._limit = file, limit
        self._used, self.number = 0, 0
        self.quoted = False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._file.readline(self._limit + 1 - self._used)
        if not line:
            raise StopIteration
        self.number += 1
        self._used += len(line) if line.isascii() else len(line.encode("utf-8", "surrogateescape"))
        self.quoted = self.quoted or '"' in line
        if self._used > self._limit:
            while not line.endswith(("\n", "\r")) and (line := self._file.readline(_PIECE)):
                self.quoted = self.quoted or '"' in line
            raise _TooLongError
        return line

    def next_row(self) -> None:
        """Begin to count anew."""
        self._used, self.quoted = 0, False


class _TooLongError(Exception):
    """A row beyond the limit."""


def _csv(path: Path, limit: int) -> Rows:
    csv.field_size_limit(2**31 - 1)  # Rows have a limit of their own.
    with open_text(path) as binary, io.TextIOWrapper(binary, "utf-8-sig", "surrogateescape", newline="") as file:
        lines = _Lines(file, limit)
        reader = csv.reader(lines, strict=True)
        header = _header(reader, path)
        while True:
            lines.next_row()
            started = lines.number + 1
            try:
                cells = next(reader, None)
            except _TooLongError:
                if lines.quoted:
                    reason = f"{too_long(limit)}, or a quote in it is never closed"
                    raise DataError(f"{shown_name(path)}:{started}: the row is {reason}") from None
                yield bad_row(f"{shown_name(path)}:{started}", too_long(limit))
                continue
            except csv.Error as error:
                if "end of data" in str(error):
                    # Whatever follows the quote is one cell: the rows in it are lost.
                    raise DataError(f"{shown_name(path)}:{started}: a quote in this row is never closed") from error
                yield bad_row(f"{shown_name(path)}:{lines.number}", f"not valid CSV ({error})")
                continue
            if cells is None:
                return
            if not cells:
                continue
            if len(cells) != len(header):
                reason = f"has {len(cells)} cells, but the header has {len(header)}"
                yield bad_row(f"{shown_name(path)}:{lines.number}", reason)
            else:
                yield f"{shown_name(path)}:{lines.number}", dict(zip(header, cells, strict=True))


def _header(reader: Any, path: Path) -> list[str]:
    """The names of the columns; raises DataError where they cannot be."""
    key = f"{shown_name(path)}:1"
    try:
        header: list[str] = next(reader, [])
    except csv.Error as error:
        raise DataError(f"{key}: its header cannot be read: {error}") from error
    except _TooLongError:
        raise DataError(f"{key}: its header is longer than a row may be: is it CSV?") from None
    names: list[str] = [str(name) for name in header]
    if any("\udc80" <= character <= "\udcff" for name in names for character in name):
        raise DataError(f"{key}: its header is not valid UTF-8: save the file as UTF-8")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{key}: the column {twice!r:.80} occurs twice in the header")
    if len(names) == 1 and (mark := next((mark for mark in (";", "\t", "|") if mark in names[0]), None)):
        raise DataError(f"{key}: its columns stand apart by {mark!r}: save the file with commas")
    return names


_TEXT: dict[str, Callable[[Path, int], Rows]] = {".jsonl": json_rows, ".json": json_rows, ".csv": _csv}
_BINARY: dict[str, Callable[[Path, int], Rows]] = {".parquet": parquet_rows, ".arrow": arrow_rows}
