"""The files of a model directory, read without trusting them: JSON objects and the headers of safetensors. No torch."""

import json
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config.errors import ConfigError

MIB = 2**20
JSON_LIMIT = 32 * MIB  # The index of a model with 10⁵ tensors has 10 MiB.
HEADER_LIMIT = 100 * MIB  # That of the safetensors library.
_WIDTHS = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1}
_WIDTHS |= {"I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}


class ModelFileError(ConfigError):
    """A file of a model directory that cannot be used: which, and why."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies in a safetensors file: bytes [begin, end) of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def elements(self) -> int:
        """The numbers in it."""
        count = 1
        for size in self.shape:
            count *= size
        return count


def read_regular(path: Path, *, limit: int) -> bytes:
    """A file's bytes. Raises ModelFileError for what is no regular file, is larger than `limit`, or cannot be read."""
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise ModelFileError(f"{path} is {_file_kind(facts.st_mode)}, no regular file")
        if facts.st_size > limit:
            raise ModelFileError(f"{path} has {facts.st_size / MIB:,.0f} MiB, where at most {limit // MIB} make sense")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path.
        if isinstance(error, ModelFileError):
            raise
        raise ModelFileError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _file_kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def read_text_file(path: Path, *, limit: int = JSON_LIMIT) -> str:
    """A text file in UTF-8; raises ModelFileError."""
    try:
        return read_regular(path, limit=limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelFileError(f"{path} is no text in UTF-8: byte {error.start}") from error


def read_object(path: Path, *, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """A JSON object; raises ModelFileError for anything else."""
    return parse_object(read_text_file(path, limit=limit), path)


def parse_object(text: str, path: Path) -> dict[str, Any]:
    """The JSON object of a text that stands in a file; raises ModelFileError."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ModelFileError(f"{path} is nested too deeply") from error
    except ValueError as error:  # Also numbers of thousands of digits.
        raise ModelFileError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{path} holds {kind_of(value)} where an object belongs")
    return value


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    if isinstance(value, int | float):
        return f"the number {value}" if abs(value) < 1e24 else "an enormous number"
    return "a list" if isinstance(value, list) else "an object"


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name, from its header; raises ModelFileError for a damaged file."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ModelFileError(f"{path} is {_file_kind(path.stat().st_mode)}, no regular file")
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            (length,) = struct.unpack("<Q", start) if len(start) == 8 else (0,)
            if not 2 <= length <= min(HEADER_LIMIT, max(size - 8, 0)):
                raise ModelFileError(f"{path} is no safetensors file, or was cut off: it has {size:,} bytes")
            text = file.read(length).decode("utf-8")
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ModelFileError(f"{path} is no safetensors file: its header is no text") from error
    entries = parse_object(text, path)
    facts = entries.pop("__metadata__", {})
    if not isinstance(facts, dict) or not all(isinstance(value, str) for value in facts.values()):
        raise ModelFileError(f"{path}: the header's __metadata__ is {kind_of(facts)}; it must be an object of texts")
    found = {name: _stored(name, entry, path, data=8 + length) for name, entry in entries.items()}
    last = max((tensor.end for tensor in found.values()), default=8 + length)
    if last != size:
        raise ModelFileError(f"{path} has {size:,} bytes where its header says {last:,}: it was cut off or changed")
    return found


def _stored(name: str, entry: Any, path: Path, *, data: int) -> StoredTensor:
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = str(entry.get("dtype")), _sizes(entry.get("shape")), _sizes(entry.get("data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2 or len(shape) > 16:
        raise ModelFileError(f"{path}: the header's entry of {name[:80]!r} is damaged")
    tensor = StoredTensor(path, dtype, shape, data + offsets[0], data + offsets[1])
    if tensor.end < tensor.begin or tensor.elements * _WIDTHS.get(dtype, 0) not in (0, tensor.end - tensor.begin):
        raise ModelFileError(f"{path}: the header's entry of {name[:80]!r} has a shape that is not its size")
    return tensor


def _sizes(value: Any) -> tuple[int, ...] | None:
    """A list of numbers of bytes or elements; None for anything else."""
    usual = isinstance(value, list) and all(type(number) is int and 0 <= number < 2**63 for number in value)
    return tuple(value) if usual else None
