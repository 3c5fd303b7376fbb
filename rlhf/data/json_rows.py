"""Rows of JSON: an object in each line, an array of objects, objects one behind the other, or one object around them.

What a file is called does not decide which of these it is: it is told by how the file begins. One row is in memory at
a time.
"""

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO

from rlhf.config.errors import DataError
from rlhf.config.terminal import shown_name
from rlhf.data.text_files import Rows, bad_row, open_text, too_long

_BOM = b"\xef\xbb\xbf"
_PIECE = 1024**2
_SPACE = re.compile(r"\s*")
# What an object around all rows calls their list.
_LISTS = ("data", "rows", "examples", "train", "items", "records", "instances", "samples", "results", "dataset")
_OF_MESSAGES = {"role", "from", "content", "value"}
TOO_DEEP = "nested too deeply"
_WANTED = "must hold a JSON array of rows, or one object in each line"


class JsonError(ValueError):
    """Text that is no JSON, or none that can be used; the message gives the reason."""


class RepeatedKeyError(JsonError):
    """An object in which a key occurs twice."""


class _RowError(ValueError):
    """One row that cannot be, where the next one can be read; the message gives the reason."""


class _TooLongError(_RowError):
    """A row beyond the limit."""


class _UnendedError(_TooLongError):
    """A row beyond the limit of which the end was not looked for."""


class _SyntaxError(ValueError):
    """Text that is no JSON: what follows cannot be read."""


def json_rows(path: Path, limit: int) -> Rows:
    """The rows of a file, whichever way they stand in it."""
    as_lines = path.name.lower().removesuffix(".gz").endswith(".jsonl")
    with open_text(path) as file:
        start, more = _first_line(file, limit)
    if start.startswith(b"[") and (not as_lines or _is_array(start, more=more)):
        yield from _array(path, limit)
    elif start.startswith(b"{"):
        yield from _objects(path, limit, start, as_lines=as_lines, more=more)
    elif as_lines or not start:
        yield from _lines(path, limit)
    else:
        raise DataError(f"{shown_name(path)}: {_WANTED}")


def _first_line(file: BinaryIO, limit: int) -> tuple[bytes, bool]:
    """The first line with something in it, cut where it is too long, and whether something follows it."""
    start = file.read(_PIECE).removeprefix(_BOM).lstrip()
    while not start and (piece := file.read(_PIECE)):
        start = piece.lstrip()
    line, ended, rest = start.partition(b"\n")
    if not ended and len(line) <= limit:
        line += file.readline(limit + 1)
    more = bool(rest.strip()) or any(piece.strip() for piece in iter(lambda: file.read(_PIECE), b""))
    return line.strip(), more


def _is_array(line: bytes, *, more: bool) -> bool:
    """Whether the first line of a file of lines is the beginning of an array of rows, or all of one."""
    try:
        whole = isinstance(parsed(line), list)
    except ValueError:
        return re.match(rb"\[\s*(\{|$)", line) is not None
    return whole and not more


def parsed(text: bytes | str) -> Any:
    """The value that a text is in JSON; raises JsonError with the reason."""
    try:
        return _DECODER.decode(text if isinstance(text, str) else text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise JsonError(f"not valid UTF-8 ({error.reason} at byte {error.start})") from error
    except RecursionError as error:
        raise JsonError(TOO_DEEP) from error
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.doc[error.pos :].strip() == ",":
            raise JsonError("not valid JSON (a comma behind the object: a line holds an object alone)") from error
        raise JsonError(f"not valid JSON ({error.msg.removesuffix(' at')} at character {error.pos + 1})") from error
    except RepeatedKeyError:
        raise
    except ValueError as error:  # Python refuses to compute with numbers of thousands of digits.
        raise JsonError("a number in it has too many digits") from error


def check_keys(keys: Sequence[Any]) -> None:
    """Raise RepeatedKeyError where two keys of an object are the same: of two values one would be lost."""
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RepeatedKeyError(f"the key {twice!r:.80} occurs twice in an object")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    check_keys([key for key, _ in pairs])
    return dict(pairs)


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
# Takes whatever has the form of JSON: it finds the end of a row that cannot be used.
_LENIENT = json.JSONDecoder(parse_int=str)


def _lines(path: Path, limit: int) -> Rows:
    with open_text(path) as file:
        number = 0
        while line := file.readline(limit + 2):
            number += 1
            where = f"{shown_name(path)}:{number}"
            line = line.removeprefix(_BOM) if number == 1 else line
            if len(line.rstrip(b"\r\n")) > limit:
                while not line.endswith(b"\n") and (line := file.readline(_PIECE)):
                    pass
                yield bad_row(where, too_long(limit))
            elif line.strip():
                try:
                    yield where, parsed(line.rstrip())
                except ValueError as error:
                    yield bad_row(where, str(error))


class _Text:
    """JSON values out of a text that is read piece by piece."""

    def __init__(self, file: IO[str], limit: int) -> None:
        self._file, self._limit = file, limit
        self._text, self._at = "", 0

    def _more(self) -> bool:
        more = self._file.read(max(_PIECE, len(self._text) - self._at))
        if more:
            self._text, self._at = self._text[self._at :] + more, 0
        return bool(more)

    def peek(self) -> str:
        """The next character that is no white space, or nothing at the end."""
        while True:
            found = _SPACE.match(self._text, self._at)
            self._at = found.end() if found is not None else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self, *wanted: str) -> str:
        """The next character, which must be one of these."""
        if (found := self.peek()) not in wanted:
            instead = f"{found!r} stands behind it instead of " if found else "there is no "
            raise _SyntaxError(f"{instead}{' or '.join(wanted)}{'' if found else ' behind it'}")
        self._at += 1
        return found

    def value(self) -> Any:
        """The next value; raises _SyntaxError, or _RowError where what follows can be read all the same."""
        self.peek()
        while True:
            try:
                end = _LENIENT.raw_decode(self._text, self._at)[1]
                # A number at the very end may go on in the next piece.
                if end < len(self._text) or not self._more():
                    break
                continue
            except RecursionError as error:
                raise _SyntaxError("nested too deeply") from error
            except json.JSONDecodeError as error:
                # A value that is only cut off fails at the end, or where the text in quotes begins.
                if error.pos < len(self._text) - 16 and not error.msg.startswith("Unterminated"):
                    raise _SyntaxError(error.msg) from error
                reason = error.msg.removesuffix(" at")
            if len(self._text) - self._at > self._limit:
                raise _UnendedError(f"{too_long(self._limit)}, or {reason}")
            if not self._more():
                raise _SyntaxError(reason)
        return self._checked(end)

    def _checked(self, end: int) -> Any:
        text = self._text[self._at : end]
        self._at = end
        if len(text) > self._limit or (not text.isascii() and _size(text) > self._limit):
            raise _TooLongError(too_long(self._limit))
        try:
            # Bytes that are no UTF-8 were kept as halves of surrogate pairs.
            return parsed(text.encode("utf-8", "surrogateescape"))
        except JsonError as error:
            raise _RowError(str(error)) from error


def _size(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _opened(path: Path) -> io.TextIOWrapper:
    return io.TextIOWrapper(open_text(path), "utf-8-sig", "surrogateescape", newline="")


def _array(path: Path, limit: int) -> Rows:
    """The elements of a JSON array."""
    with _opened(path) as file:
        text = _Text(file, limit)
        yield from _elements(text, path)
        if text.peek():
            raise DataError(f"{shown_name(path)}: not valid JSON (there is more behind the array)")


def _elements(text: _Text, path: Path) -> Rows:
    """The elements of the array that begins here."""
    text.take("[")
    number, end = 0, text.peek()
    if end == "]":
        text.take("]")
    while end != "]":
        number += 1
        try:
            yield f"{shown_name(path)}: row {number}", text.value()
        except _UnendedError as error:
            raise DataError(f"{shown_name(path)}: row {number} is {error}") from None
        except _RowError as error:
            yield bad_row(f"{shown_name(path)}: row {number}", str(error))
        except _SyntaxError as error:
            raise DataError(f"{shown_name(path)}: not valid JSON (row {number}: {error})") from None
        try:
            end = text.take(",", "]")
        except _SyntaxError as error:
            raise DataError(f"{shown_name(path)}: not valid JSON (row {number}: {error})") from None


def _objects(path: Path, limit: int, line: bytes, *, as_lines: bool, more: bool) -> Rows:
    """What begins with an object: lines, objects one behind the other, or one object alone."""
    text = line.decode("utf-8", "replace")
    try:
        rest = text[_LENIENT.raw_decode(text)[1] :].strip()
        is_first_of_lines = more or bool(rest)
    except (ValueError, RecursionError):
        is_first_of_lines = False
    if is_first_of_lines or (as_lines and len(line) > limit):
        yield from _lines(path, limit)
    else:
        yield from _in_sequence(path, limit)


def _in_sequence(path: Path, limit: int) -> Rows:
    """Objects that have several lines each; or one alone, which may be longer than a row and hold the rows."""
    with _opened(path) as file:
        text, number = _Text(file, limit), 1
        while True:
            where = f"{shown_name(path)}: row {number}"
            found: Any
            try:
                found = text.value()
            except _UnendedError as error:
                if number > 1:
                    raise DataError(f"{where} is {error}") from None
                yield from _around(path, limit)
                return
            except _RowError as error:
                found = error
            except _SyntaxError as error:
                if number > 1:
                    raise DataError(f"{where}: not valid JSON ({error})") from None
                yield from _lines(path, limit)  # The first of many lines may be the broken one.
                return
            ended = not text.peek()
            if ended and number == 1:
                yield from _around(path, limit) if isinstance(found, _TooLongError) else _alone(path, found)
                return
            yield bad_row(where, str(found)) if isinstance(found, _RowError) else (where, found)
            if ended:
                return
            number += 1


def _alone(path: Path, found: Any) -> Rows:
    """A file that is one object: it holds the rows in a list, or is the only row."""
    if isinstance(found, _RowError):
        yield bad_row(f"{shown_name(path)}:1", str(found))
        return
    lists = [key for key, value in found.items() if _are_rows(value) and (key in _LISTS or len(found) == 1)]
    if len(lists) > 1:
        raise DataError(_several(path, lists))
    if not lists and _are_columns(found):
        raise DataError(
            f"{shown_name(path)} holds columns, not rows: write one object for each row, with pandas as in  "
            "to_json(PATH, orient='records', lines=True)"
        )
    if not lists:
        yield f"{shown_name(path)}:1", found
    elif others := [key for key, value in found.items() if key not in lists and _has_rows(value)]:
        raise DataError(_several(path, [*lists, *others]))
    for key in lists:
        for number, row in enumerate(found[key], start=1):
            yield f"{shown_name(path)}: row {number}", row


def _several(path: Path, names: list[str]) -> str:
    listed = ", ".join(shown_name(name) for name in names)
    return f"{shown_name(path)} holds several lists of rows ({listed}): save the one to train on as a file of its own"


def _are_rows(value: Any) -> bool:
    """Whether a value is a list of objects that are no messages."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(entry, Mapping) for entry in value)
        and not _OF_MESSAGES.intersection(value[0])
    )


def _has_rows(value: Any) -> bool:
    """Whether some of a value may be rows: beside the list that is read they would be lost."""
    return isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value)


def _are_columns(found: Mapping[str, Any]) -> bool:
    """Whether all values are texts or numbers by position: as lists of the same length, or keyed by number."""
    lengths = {len(value) if isinstance(value, list | Mapping) else 0 for value in found.values()}
    if len(lengths) != 1 or 0 in lengths:
        return False
    if all(isinstance(value, Mapping) for value in found.values()):
        return all(key.isdigit() for value in found.values() for key in value)
    return all(isinstance(value, list) and not any(map(_is_nested, value)) for value in found.values())


def _is_nested(value: Any) -> bool:
    return isinstance(value, list | Mapping)


def _around(path: Path, limit: int) -> Rows:
    """The rows of one large object, which has them in a list."""
    names: list[str] = []
    others: list[str] = []
    with _opened(path) as file:
        text = _Text(file, limit)
        try:
            text.take("{")
            end = "," if text.peek() != "}" else text.take("}")
            while end == ",":
                key = text.value()
                text.take(":")
                if key in _LISTS and text.peek() == "[":
                    names.append(key)
                    if len(names) > 1 or others:
                        raise DataError(_several(path, [*names, *others]))
                    yield from _elements(text, path)
                elif _has_rows(text.value()):
                    others.append(key)
                    if names:
                        raise DataError(_several(path, [*names, *others]))
                end = text.take(",", "}")
        except _RowError as error:
            raise DataError(
                f"{shown_name(path)}: its first row is {error}; rows in a list inside an object are found where the "
                f"list is called {', '.join(_LISTS)}"
            ) from None
        except _SyntaxError as error:
            raise DataError(f"{shown_name(path)}: not valid JSON ({error})") from None
    if not names:
        yield bad_row(f"{shown_name(path)}:1", too_long(limit))
