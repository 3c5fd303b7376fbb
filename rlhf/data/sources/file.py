"""Rows in local files, or all files of a directory: .jsonl, .json, .csv (each also .gz), .parquet, .arrow."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from rlhf.config.errors import ConfigError, DataError
from rlhf.config.regular import kind_of, open_regular
from rlhf.config.schema import SourceConfig
from rlhf.config.terminal import shown_name
from rlhf.data.readers import can_read, read_rows, suffixes
from rlhf.data.row_files import RowFiles, find_row_files
from rlhf.data.text_files import Rows


def source_files(source: SourceConfig, *, name: str) -> RowFiles:
    """The file, or the files below the directory in the order of their names."""
    key = f"data.sources.{name}.path"
    if not source.path:
        raise ConfigError(f"{key} is not set: give it a file or directory, as in  {key}=my.jsonl")
    path = Path(source.path).expanduser()
    given = f"{key}={shown_name(source.path):.300}"
    endings = f"a file ending in {', '.join(suffixes())}"
    try:
        kind = kind_of(path)
        if kind is None:
            raise DataError(f"{given} does not exist: give {endings}, or a directory of them")
        if kind not in ("file", "directory"):
            raise DataError(f"{given} is {kind}: give {endings}, or a directory of them")
        if kind == "file" and not can_read(path):
            raise DataError(f"{given}: the name must be that of {endings}")
        found = find_row_files(path, split=source.split, endings=suffixes(), key=f"data.sources.{name}.split")
    except OSError as error:
        raise DataError(f"{given} cannot be read: {error.strerror}") from error
    if not found.files:
        others = f" (but {_listed(found)})" if found.left_out else ""
        raise DataError(f"{given} has no such file{others}: give {endings}, or a directory of them")
    return found


def _listed(found: RowFiles) -> str:
    return ", ".join(f"{number} {reason}" for reason, number in found.left_out.items())


def left_out(source: SourceConfig, *, name: str) -> str:
    """How many files of a directory are not read, and why."""
    found = source_files(source, name=name)
    number = len(found.files)
    return f"{number} file{'s' if number > 1 else ''} read, left out: {_listed(found)}" if found.left_out else ""


def rows_by_file(source: SourceConfig, *, name: str) -> Iterator[tuple[str, Rows]]:
    """The files in their order, each with its rows."""
    for file in source_files(source, name=name).files:
        yield shown_name(file), read_rows(file, source=name, limit=source.max_row_bytes)


def content_digest(source: SourceConfig, *, name: str) -> str:
    """Hash of the files' names and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for file in source_files(source, name=name).files:
        try:
            with open_regular(file) as opened:
                content = hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        except OSError as error:
            raise DataError(f"{shown_name(file)} cannot be read: {error.strerror}") from error
        digest.update(f"{shown_name(file.name)} {content} ".encode())
    return digest.hexdigest()
