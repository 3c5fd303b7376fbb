"""Opening files of rows that are text: unpacked where they are gzipped, and refused where they are something else."""

import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from rlhf.config.errors import DataError
from rlhf.config.regular import open_regular
from rlhf.config.terminal import shown_name
from rlhf.data.conversation import Refused

Rows = Iterator[tuple[str, Any] | Refused]
# Text of rows shrinks to a tenth when it is packed; what was made to flood a reader to a thousandth.
_EXPANSION = 250
_FREE = 256 * 1024**2
_SNIFFED = 4096
# What other kinds of files begin with.
_FOREIGN = {
    b"\xff\xfe": "is UTF-16: save it as UTF-8",
    b"\xfe\xff": "is UTF-16: save it as UTF-8",
    b"\x1f\x8b": "is gzipped: add .gz to its name",
    b"PK\x03\x04": "is a zip archive or a spreadsheet: unpack it, or save it as CSV",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd: unpack it",
    b"BZh": "is compressed with bzip2: unpack it",
    b"\xfd7zXZ": "is compressed with xz: unpack it",
    b"PAR1": "is Parquet: name it so, with the ending .parquet",
    b"ARROW1": "is Arrow: name it so, with the ending .arrow",
    b"version https://git-lfs": "is a pointer of Git LFS: fetch the file itself with  git lfs pull",
}


def too_long(limit: int) -> str:
    """The reason of a row beyond the limit."""
    return f"longer than {limit} bytes (data.sources.*.max_row_bytes)"


def bad_row(where: str, reason: str) -> Refused:
    """A row that cannot be read; `read_rows` fills in the source."""
    return Refused(source="", where=where, reason=reason)


def open_text(path: Path) -> BinaryIO:
    """Open a file of text, unpacked where its name ends in .gz.

    Raises DataError for what is plainly no UTF-8 text, and OSError; reading on may raise what gzip raises.
    """
    file: Any = open_regular(path)
    if path.suffix.lower() == ".gz":
        file = io.BufferedReader(_Unpacked(file), 2**16)
    try:
        _check_head(file.peek(_SNIFFED)[:_SNIFFED], path)
    except BaseException:
        file.close()
        raise
    return file  # type: ignore[no-any-return]


def _check_head(head: bytes, path: Path) -> None:
    for magic, what in _FOREIGN.items():
        if head.startswith(magic):
            raise DataError(f"{shown_name(path)} {what}")
    # Every second byte of Latin letters is 0 there.
    if head[1:4:2] == b"\0\0" or head[0:3:2] == b"\0\0":
        raise DataError(f"{shown_name(path)} is no text, or is UTF-16 or UTF-32: save it as UTF-8")


class _Unpacked(io.RawIOBase):
    """What a gzipped file holds; raises OSError where a small file would go on and on."""

    def __init__(self, packed: BinaryIO) -> None:
        self._packed = packed
        self._size = max(1, packed.seek(0, io.SEEK_END))
        packed.seek(0)
        self._file = gzip.GzipFile(fileobj=packed)
        self._read = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer with what comes next."""
        number = self._file.readinto(buffer)
        self._read += number
        if self._read > _FREE and self._read > _EXPANSION * self._size:
            raise OSError(f"it grows more than {_EXPANSION}-fold when unpacked: if that is right, unpack it yourself")
        return number

    def close(self) -> None:
        """Close the file and what unpacks it."""
        self._file.close()
        self._packed.close()
        super().close()
