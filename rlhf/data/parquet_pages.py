"""How large the pages of a Parquet file are, without unpacking them: a page is in memory whole before its cells are.

The footer and the headers of pages are in Thrift's compact protocol (github.com/apache/parquet-format, parquet.thrift).
They are read here because pyarrow ends the process where a damaged footer lists fewer columns than the schema.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rlhf.config.errors import DataError
from rlhf.config.regular import open_regular
from rlhf.config.terminal import shown_name

_MAGIC = b"PAR1"
_LARGEST_FOOTER = 64 * 1024**2
_HEADER = 64 * 1024  # Bytes that a header may have: it holds two sizes, and perhaps the least and greatest value.
_DICTIONARY = 2
# The numbers of fields in FileMetaData, RowGroup, ColumnChunk, ColumnMetaData and PageHeader.
_ROW_GROUPS = 4
_COLUMNS, _NUM_ROWS = 1, 3
_META_DATA = 3
_UNCOMPRESSED_SIZE, _COMPRESSED_SIZE, _DATA_PAGE, _DICTIONARY_PAGE = 6, 7, 9, 11
_PAGE_KIND, _PAGE_UNPACKED, _PAGE_PACKED = 1, 2, 3
# The protocol's kinds of values.
_TRUE, _FALSE, _I8, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12
_DEEPEST = 16


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows and bytes of a row group, and bytes of its largest page and its largest dictionary, all unpacked."""

    rows: int
    size: int
    largest: int
    dictionary: int


def row_groups(path: Path) -> list[RowGroup]:
    """What the row groups of a file are; raises DataError where its footer cannot be.

    Where the headers of pages cannot be read, a whole column counts as one page.
    """
    with open_regular(path) as file:
        try:
            return [_row_group(file, group) for group in _footer(file)[_ROW_GROUPS]]
        except (LookupError, TypeError, ValueError, AttributeError, OSError) as error:
            raise DataError(f"{shown_name(path)}: not valid Parquet (its footer cannot be read)") from error


def _footer(file: BinaryIO) -> dict[int, Any]:
    size = file.seek(0, 2)
    file.seek(max(0, size - 8))
    length, magic = int.from_bytes(file.read(4), "little"), file.read(4)
    if magic != _MAGIC or not 0 < length <= min(size - 8, _LARGEST_FOOTER):
        raise ValueError("no footer")
    file.seek(size - 8 - length)
    return _Compact(file.read(length)).struct()


def _row_group(file: BinaryIO, group: dict[int, Any]) -> RowGroup:
    columns = [column[_META_DATA] for column in group[_COLUMNS]]
    pages = [page for column in columns for page in _pages_or_column(file, column)]
    return RowGroup(
        rows=max(0, group[_NUM_ROWS]),
        size=sum(max(0, column[_UNCOMPRESSED_SIZE]) for column in columns),
        largest=max((size for _, size in pages), default=0),
        dictionary=max((size for kind, size in pages if kind == _DICTIONARY), default=0),
    )


def _pages_or_column(file: BinaryIO, column: dict[int, Any]) -> list[tuple[int, int]]:
    try:
        return list(_pages(file, column))
    except (LookupError, TypeError, ValueError, OSError):
        return [(0, max(0, column[_UNCOMPRESSED_SIZE]))]


def _pages(file: BinaryIO, column: dict[int, Any]) -> Iterator[tuple[int, int]]:
    """Kind and unpacked bytes of each page of a column."""
    at = min(start for start in (column[_DATA_PAGE], column.get(_DICTIONARY_PAGE)) if start)
    end = at + column[_COMPRESSED_SIZE]
    while at < end:
        file.seek(at)
        header = _Compact(file.read(min(_HEADER, end - at)))
        fields = header.struct()
        unpacked, packed = fields[_PAGE_UNPACKED], fields[_PAGE_PACKED]
        if packed < 0 or unpacked < 0:
            raise ValueError("a page of negative size")
        yield fields[_PAGE_KIND], unpacked
        at += header.at + packed


class _Compact:
    """Thrift's compact protocol; raises IndexError at the end of the bytes, ValueError for what it does not know."""

    def __init__(self, content: bytes) -> None:
        self._content, self.at = content, 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """The fields of a struct by number."""
        if depth > _DEEPEST:
            raise ValueError("nested too deeply")
        found: dict[int, Any] = {}
        number = 0
        while byte := self._byte():
            number = number + (byte >> 4) if byte >> 4 else self._signed()
            kind = byte & 15
            # A Boolean field is its own value.
            found[number] = kind == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind, depth)
        return found

    def _value(self, kind: int, depth: int) -> Any:
        """An integer, a struct or a list; texts and fractions are passed over."""
        if kind in (_I16, _I32, _I64):
            return self._signed()
        if kind == _STRUCT:
            return self.struct(depth + 1)
        if kind in (_LIST, _SET):
            if depth > _DEEPEST:
                raise ValueError("nested too deeply")
            byte = self._byte()
            length = byte >> 4 if byte >> 4 < 15 else self._unsigned()
            if length > len(self._content):
                raise ValueError("a list longer than the bytes")
            return [self._value(byte & 15, depth + 1) for _ in range(length)]
        if kind in (_I8, _TRUE, _FALSE):  # Inside a list a Boolean has a byte of its own.
            length = 1
        elif kind == _DOUBLE:
            length = 8
        elif kind == _BINARY:
            length = self._unsigned()
        else:
            raise ValueError(f"the kind {kind}")
        self.at += length
        return None

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
