"""How large the pages of a Parquet file are, without unpacking them: a page is in memory whole before its cells are.

The headers of pages are in Thrift's compact protocol (github.com/apache/parquet-format, `PageHeader`):
1 type, 2 uncompressed_page_size, 3 compressed_page_size; whatever else they hold is passed over.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rlhf.config.regular import open_regular

_HEADER = 64 * 1024  # Bytes that a header may have: it holds two sizes, and perhaps the least and greatest value.
_DICTIONARY = 2
_I8, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = 3, 4, 5, 6, 7, 8, 9, 10, 11, 12


@dataclass(frozen=True, slots=True)
class Pages:
    """Bytes of the largest page of a row group, and of its largest dictionary, both unpacked."""

    largest: int
    dictionary: int


def pages_of(path: Path, group: Any) -> Pages:
    """The pages of a row group (pyarrow's metadata of it). Where headers cannot be read, a whole column counts."""
    largest = dictionary = 0
    with open_regular(path) as file:
        for index in range(group.num_columns):
            column = group.column(index)
            try:
                found = _column(file, column)
            except (IndexError, ValueError):
                found = Pages(column.total_uncompressed_size, 0)
            largest, dictionary = max(largest, found.largest), max(dictionary, found.dictionary)
    return Pages(largest, dictionary)


def _column(file: BinaryIO, column: Any) -> Pages:
    starts = [column.data_page_offset, column.dictionary_page_offset if column.has_dictionary_page else None]
    at = min(start for start in starts if start)
    end = at + column.total_compressed_size
    largest = dictionary = 0
    while at < end:
        file.seek(at)
        header = _Compact(file.read(min(_HEADER, end - at)))
        numbers = header.struct()
        kind, unpacked, packed = (numbers[field] for field in (1, 2, 3))
        if packed < 0 or unpacked < 0:
            raise ValueError("a page of negative size")
        largest = max(largest, unpacked)
        dictionary = max(dictionary, unpacked if kind == _DICTIONARY else 0)
        at += header.at + packed
    return Pages(largest, dictionary)


class _Compact:
    """Thrift's compact protocol; raises IndexError at the end of the bytes, ValueError for what it does not know."""

    def __init__(self, content: bytes) -> None:
        self._content, self.at = content, 0

    def struct(self, depth: int = 0) -> dict[int, int]:
        """The integers of a struct by field number; its other fields are passed over, and those inside of it."""
        if depth > 8:
            raise ValueError("nested too deeply")
        found: dict[int, int] = {}
        number = 0
        while byte := self._byte():
            number = number + (byte >> 4) if byte >> 4 else self._signed()
            kind = byte & 15
            if kind in (_I16, _I32, _I64):
                found[number] = self._signed()
            elif kind > 2:  # A Boolean field is its own value.
                self._skip(kind, depth)
        if not {1, 2, 3} <= found.keys() and depth == 0:
            raise ValueError("no header of a page")
        return found

    def _byte(self) -> int:
        self.at += 1
        return self._content[self.at - 1]

    def _unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128 or shift > 70:
                return value

    def _signed(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)

    def _skip(self, kind: int, depth: int) -> None:
        if kind in (_I16, _I32, _I64):
            self._unsigned()
        elif kind in (_I8, 1, 2):  # Inside a list a Boolean has a byte of its own.
            self.at += 1
        elif kind == _DOUBLE:
            self.at += 8
        elif kind == _BINARY:
            length = self._unsigned()
            self.at += length
        elif kind in (_LIST, _SET):
            byte = self._byte()
            for _ in range(byte >> 4 if byte >> 4 < 15 else self._unsigned()):
                self._skip(byte & 15, depth + 1)
        elif kind == _STRUCT:
            self.struct(depth + 1)
        else:
            raise ValueError(f"the type {kind}")
