"""Rows in local files: JSON Lines (.jsonl, also .jsonl.gz), or one JSON array (.json)."""

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlhf.config.errors import ConfigError, DataError
from rlhf.config.schema import DataFormat, SourceConfig
from rlhf.data.conversation import Conversation, Message

SUFFIXES = (".jsonl", ".jsonl.gz", ".json")
COLUMNS = {DataFormat.preference: ("prompt", "chosen", "rejected"), DataFormat.prompt: ("prompt",)}


def source_files(source: SourceConfig, *, name: str) -> list[Path]:
    """The file, or the files of the directory in the order of their names."""
    key = f"data.sources.{name}.path"
    if not source.path:
        raise ConfigError(f"{key} is not set: give it a file or directory, as in  {key}=my.jsonl")
    path = Path(source.path).expanduser()
    files = sorted(file for file in path.iterdir() if file.name.endswith(SUFFIXES)) if path.is_dir() else [path]
    if not path.exists() or not files:
        what = "has no such file" if path.is_dir() else "does not exist"
        raise DataError(f"{key}={source.path} {what}: give a file ending in {', '.join(SUFFIXES)}, or their directory")
    if not files[0].name.endswith(SUFFIXES):
        raise DataError(f"{key}={source.path}: the name must end in {', '.join(SUFFIXES)}")
    return files


def _content(file: Path) -> bytes:
    try:
        return gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def _rows(file: Path, on_bad_row: Callable[[str], None]) -> Iterator[tuple[str, Any]]:
    """Yield (where, parsed value) for every row; text that is no JSON is reported."""
    content = _content(file)
    if file.suffix == ".json":
        try:
            parsed = json.loads(content)
        except ValueError as error:
            raise DataError(f"{file}: not valid JSON ({error})") from error
        if not isinstance(parsed, list):
            raise DataError(f"{file}: must hold a JSON array of rows, not {type(parsed).__name__}")
        yield from ((f"{file}: row {number}", row) for number, row in enumerate(parsed, start=1))
        return
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"{file}:{number}", json.loads(line)
        except ValueError as error:
            on_bad_row(f"{file}:{number}: not valid JSON ({error})")


def _problem(row: Any, columns: tuple[str, ...]) -> str | None:
    if not isinstance(row, dict):
        return f"must be an object with the keys {', '.join(columns)}, not {type(row).__name__}"
    for column in columns:
        if column not in row:
            return f'the key "{column}" is missing'
        if not isinstance(row[column], str):
            return f'"{column}" must be text, not {type(row[column]).__name__}'
        if not row[column].strip():
            return f'"{column}" is empty'
        if any("\ud800" <= character <= "\udfff" for character in row[column]):
            return f'"{column}" holds half of a surrogate pair, which is no text'
    return None


def conversations(source: SourceConfig, *, name: str, on_bad_row: Callable[[str], None]) -> Iterator[Conversation]:
    """Yield the rows of the files: {prompt, chosen, rejected} (format=preference) or {prompt} (format=prompt)."""
    columns = COLUMNS[source.format]
    for file in source_files(source, name=name):
        for where, row in _rows(file, on_bad_row):
            problem = _problem(row, columns)
            if problem:
                on_bad_row(f"{where}: {problem}")
                continue
            is_pair = source.format is DataFormat.preference
            yield Conversation(
                messages=(Message("user", row["prompt"]),),
                chosen=row["chosen"] if is_pair else None,
                rejected=row["rejected"] if is_pair else None,
                source=name,
                where=where,
            )


def content_digest(source: SourceConfig, *, name: str) -> str:
    """Hash of the files' names and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for file in source_files(source, name=name):
        content = _content(file)
        digest.update(f"{file.name} {len(content)} ".encode() + content)
    return digest.hexdigest()
