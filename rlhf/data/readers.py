"""Rows of local files: JSON Lines, JSON, CSV, Parquet and Arrow, the text ones also gzipped.

Every reader yields (where, row), or `Refused` for a row that cannot be read; a file that cannot be read on raises
DataError.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from rlhf.config.errors import DataError
from rlhf.data.conversation import Refused

Rows = Iterator[tuple[str, Any] | Refused]
LONGEST_LINE = 64 * 1024**2
_BATCH = 1000
_PIECE = 1024**2
_SPACE = re.compile(r"\s*")
_NO_ROWS = ("dataset_info.json", "state.json", "dataset_dict.json")


def suffixes() -> list[str]:
    """The endings of the files that can be read."""
    return [*(f"{suffix}{zipped}" for suffix in _TEXT for zipped in ("", ".gz")), *_BINARY]


def can_read(path: Path) -> bool:
    """Whether a file's name has one of the endings, in capitals or not.

    Files whose names begin with a dot, and what `datasets` writes beside the rows of a saved set, are left alone.
    """
    name = path.name.lower()
    return not name.startswith(".") and name not in _NO_ROWS and name.endswith(tuple(suffixes()))


def read_rows(path: Path, *, source: str) -> Rows:
    """The rows of a file by its ending."""
    name = path.name.lower().removesuffix(".gz")
    reader = next(read for suffix, read in {**_TEXT, **_BINARY}.items() if name.endswith(suffix))
    try:
        yield from reader(path, source)
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"{path} cannot be read: {reason}") from error


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _parsed(text: bytes) -> Any:
    """JSON of a line; raises ValueError with the reason."""
    try:
        return json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"not valid UTF-8 ({error.reason} at byte {error.start})") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"not valid JSON ({error})") from error


def _json_lines(path: Path, source: str) -> Rows:
    with _open(path) as file:
        number = 0
        while line := file.readline(LONGEST_LINE):
            number += 1
            where = f"{path}:{number}"
            if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                while (rest := file.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
                    pass
                yield Refused(source=source, where=where, reason=f"longer than {LONGEST_LINE // 1024**2} MiB")
            elif line.strip():
                try:
                    yield where, _parsed(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
                except ValueError as error:
                    yield Refused(source=source, where=where, reason=str(error))


def _json(path: Path, source: str) -> Rows:
    """A JSON array of rows, one in memory at a time; or what is called so but has one object in each line."""
    with _open(path) as file:
        first = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if first == b"{":
        yield from _json_lines(path, source)
        return
    if first != b"[":
        raise DataError(f"{path}: must hold a JSON array of rows, or one object in each line")
    try:
        with _open(path) as binary, io.TextIOWrapper(binary, "utf-8-sig", newline="") as file:
            for number, row in enumerate(_elements(file), start=1):
                yield f"{path}: row {number}", row
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not valid UTF-8 ({error.reason} at byte {error.start} of a piece)") from error
    except RecursionError as error:
        raise DataError(f"{path}: nested too deeply") from error
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error})") from error


def _elements(file: IO[str]) -> Iterator[Any]:
    """The elements of a JSON array, decoded as they come; raises ValueError with the reason."""
    decoder, text, number = json.JSONDecoder(), file.read(_PIECE), 0
    at = _after_space(text, 0) + 1
    while not text.startswith("]", start := _after_space(text, at)):
        if number:
            if start < len(text) and text[start] != ",":
                raise ValueError(f"no comma after row {number}")
            start = _after_space(text, start + 1)
        try:
            element, end = decoder.raw_decode(text, start)
            reason = f"row {number + 1} is the last, and there is no ] behind it"
        except json.JSONDecodeError as error:
            end, reason = len(text), f"row {number + 1}: {error.msg}"
        # A number at the very end may go on in the next piece.
        if end < len(text):
            yield element
            at, number = end, number + 1
            continue
        if len(text) - at > LONGEST_LINE:
            raise ValueError(f"row {number + 1} is longer than {LONGEST_LINE // 1024**2} MiB, or {reason}")
        if not (more := file.read(max(_PIECE, len(text) - at))):
            raise ValueError(reason)
        text, at = text[at:] + more, 0
    rest = text[start + 1 :]
    while rest or (rest := file.read(_PIECE)):
        if rest.strip():
            raise ValueError("there is more behind the array")
        rest = ""


def _after_space(text: str, at: int) -> int:
    """The position of what follows white space."""
    found = _SPACE.match(text, at)
    return found.end() if found is not None else at


def _csv(path: Path, source: str) -> Rows:
    csv.field_size_limit(LONGEST_LINE)
    with _open(path) as binary, io.TextIOWrapper(binary, "utf-8-sig", "surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
        except csv.Error as error:
            raise DataError(f"{path}:1: its header cannot be read: {error}") from error
        if len(set(header)) < len(header):
            twice = next(name for name in header if header.count(name) > 1)
            raise DataError(f"{path}:1: the column {twice!r} occurs twice in the header")
        while True:
            started = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                if "end of data" in str(error):
                    # Whatever follows the quote is one cell: the rows in it are lost.
                    raise DataError(f"{path}:{started}: a quote in this row is never closed") from error
                yield Refused(source=source, where=f"{path}:{reader.line_num}", reason=f"not valid CSV ({error})")
                continue
            where = f"{path}:{reader.line_num}"
            if cells is None:
                return
            if not cells:
                continue
            if len(cells) != len(header):
                reason = f"has {len(cells)} cells, but the header has {len(header)}"
                yield Refused(source=source, where=where, reason=reason)
            else:
                yield where, dict(zip(header, cells, strict=True))


def _parquet(path: Path, source: str) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from _batches(path, source, file.iter_batches(batch_size=_BATCH))
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not valid Parquet ({_first_line(error)})") from error


def _arrow(path: Path, source: str) -> Rows:
    import pyarrow

    try:
        # Not memory-mapped: a file that shrinks meanwhile would end the process.
        with pyarrow.OSFile(str(path)) as file:
            reader: Any
            try:
                reader = pyarrow.ipc.open_stream(file)
            except pyarrow.ArrowInvalid:
                whole = pyarrow.ipc.open_file(file)
                reader = (whole.get_batch(index) for index in range(whole.num_record_batches))
            yield from _batches(path, source, reader)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not valid Arrow ({_first_line(error)})") from error


def _batches(path: Path, source: str, batches: Any) -> Rows:
    number = 0
    for batch in batches:
        _check_buffers(batch)
        for index in range(batch.num_rows):
            number += 1
            where = f"{path}: row {number}"
            try:
                row = batch.slice(index, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield Refused(source=source, where=where, reason=f"not valid UTF-8 ({error.reason})")
                continue
            except (ValueError, OverflowError) as error:
                yield Refused(source=source, where=where, reason=f"a value that Python does not have ({error})")
                continue
            yield where, row


def _check_buffers(batch: Any) -> None:
    """Raise ArrowInvalid where offsets point outside their buffers: reading such rows would end the process.

    A column of texts may hold what is not UTF-8: that is found row by row.
    """
    import pyarrow

    try:
        batch.validate(full=True)
    except pyarrow.ArrowInvalid as error:
        if "UTF8" not in str(error):
            raise
        for column in batch.columns:
            if pyarrow.types.is_string(column.type):
                column = column.view(pyarrow.binary())
            elif pyarrow.types.is_large_string(column.type):
                column = column.view(pyarrow.large_binary())
            column.validate(full=True)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


_TEXT: dict[str, Callable[[Path, str], Rows]] = {".jsonl": _json_lines, ".json": _json, ".csv": _csv}
_BINARY: dict[str, Callable[[Path, str], Rows]] = {".parquet": _parquet, ".arrow": _arrow}
