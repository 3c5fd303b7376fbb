"""How large the batches of an Arrow file are when they are unpacked: a small file can name sizes beyond any memory.

A file is a sequence of messages: -1, the length of a flatbuffer `Message`, the flatbuffer, and a body
(arrow.apache.org/docs/format/Columnar.html). Where a batch is compressed, each of its buffers begins with its length.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from rlhf.config.errors import DataError
from rlhf.config.regular import open_regular
from rlhf.config.terminal import shown_name

_MAGIC = b"ARROW1\0\0"
_LARGEST_METADATA = 64 * 1024**2
# Packed text grows about fivefold, seldom more than twentyfold.
_EXPANSION = 50
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3


def check_batches(path: Path, *, free: int) -> None:
    """Raise DataError where a batch grows beyond `free` bytes, and that many times its own length, when unpacked.

    What is no valid Arrow is left to the reader to tell.
    """
    with open_regular(path) as file:
        try:
            for packed, unpacked in _batches(file):
                if unpacked > max(free, _EXPANSION * packed):
                    raise DataError(
                        f"{shown_name(path)}: a batch of {packed} bytes grows to {unpacked} when unpacked, beyond any "
                        "text: if that is right, write the file uncompressed"
                    )
        except (struct.error, IndexError):
            return


def _batches(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Bytes of each compressed batch, as it is and unpacked."""
    if file.read(len(_MAGIC)) != _MAGIC:
        file.seek(0)
    while True:
        (length,) = struct.unpack("<i", file.read(4))
        if length == -1:
            (length,) = struct.unpack("<i", file.read(4))
        if not 0 < length <= _LARGEST_METADATA:
            return
        metadata = file.read(length)
        message = _Table(metadata, _unsigned(metadata, 0))
        body, size = file.tell(), message.long(3)
        kind, batch = message.byte(1), message.table(2)
        if kind == _DICTIONARY_BATCH and batch is not None:
            batch = batch.table(1)
        if kind in (_DICTIONARY_BATCH, _RECORD_BATCH) and batch is not None and batch.table(3) is not None:
            yield size, sum(_unpacked(file, body + offset, length) for offset, length in batch.pairs(2))
        if size < 0:
            return
        file.seek(body + size)


def _unpacked(file: BinaryIO, at: int, length: int) -> int:
    if length <= 8 or at < 0:
        return 0
    file.seek(at)
    (size,) = struct.unpack("<q", file.read(8))
    return length if size == -1 else abs(int(size))


def _unsigned(content: bytes, at: int) -> int:
    return int(struct.unpack_from("<I", content, at)[0])


class _Table:
    """A table of a flatbuffer; fields that are missing are 0 or None."""

    def __init__(self, content: bytes, at: int) -> None:
        self._content, self._at = content, at
        self._fields = at - struct.unpack_from("<i", content, at)[0]

    def _place(self, field: int) -> int | None:
        (length,) = struct.unpack_from("<H", self._content, self._fields)
        if 4 + 2 * field >= length:
            return None
        (offset,) = struct.unpack_from("<H", self._content, self._fields + 4 + 2 * field)
        return self._at + offset if offset else None

    def byte(self, field: int) -> int:
        """A field of one byte."""
        place = self._place(field)
        return 0 if place is None else self._content[place]

    def long(self, field: int) -> int:
        """A field of eight bytes."""
        place = self._place(field)
        return 0 if place is None else int(struct.unpack_from("<q", self._content, place)[0])

    def table(self, field: int) -> "_Table | None":
        """A field that is a table."""
        place = self._place(field)
        return None if place is None else _Table(self._content, place + _unsigned(self._content, place))

    def pairs(self, field: int) -> Iterator[tuple[int, int]]:
        """A field that is a vector of pairs of eight bytes each."""
        place = self._place(field)
        if place is None:
            return
        start = place + _unsigned(self._content, place)
        for index in range(_unsigned(self._content, start)):
            one, other = struct.unpack_from("<qq", self._content, start + 4 + 16 * index)
            yield int(one), int(other)
