"""Rows in local files, or all files of a directory: .jsonl, .json, .csv (each also .gz), .parquet, .arrow."""

import hashlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from rlhf.config.errors import ConfigError, DataError
from rlhf.config.schema import SourceConfig
from rlhf.data.conversation import Conversation, Refused
from rlhf.data.formats import conversations as converted
from rlhf.data.readers import can_read, read_rows, suffixes


def source_files(source: SourceConfig, *, name: str) -> list[Path]:
    """The file, or the files below the directory in the order of their names."""
    key = f"data.sources.{name}.path"
    if not source.path:
        raise ConfigError(f"{key} is not set: give it a file or directory, as in  {key}=my.jsonl")
    path = Path(source.path).expanduser()
    endings = f"a file ending in {', '.join(suffixes())}"
    if not path.exists():
        raise DataError(f"{key}={source.path} does not exist: give {endings}, or a directory of them")
    if not path.is_dir():
        if not can_read(path):
            raise DataError(f"{key}={source.path}: the name must be that of {endings}")
        return [path]
    files = sorted(file for file in path.rglob("*") if file.is_file() and can_read(file))
    if not files:
        raise DataError(f"{key}={source.path} has no such file: give {endings}, or a directory of them")
    return files


def conversations(source: SourceConfig, *, name: str) -> Iterator[Conversation | Refused]:
    """Yield the rows of the files in the source's format."""
    rows = chain.from_iterable(read_rows(file, source=name) for file in source_files(source, name=name))
    return converted(rows, source, name=name)


def content_digest(source: SourceConfig, *, name: str) -> str:
    """Hash of the files' names and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for file in source_files(source, name=name):
        try:
            with file.open("rb") as opened:
                content = hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror}") from error
        digest.update(f"{file.name} {content} ".encode())
    return digest.hexdigest()
