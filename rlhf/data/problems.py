"""What is wrong with the sources of a mix, before anything is read. Imports nothing heavy."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from rlhf.config.explain import did_you_mean
from rlhf.config.regular import kind_of
from rlhf.config.schema import AUTO, DataConfig, SourceConfig
from rlhf.config.terminal import shown_name
from rlhf.data.formats import format_module, format_names
from rlhf.data.sources import source_kinds
from rlhf.data.split import STAGES

# Bytes: names of directories, which have at most 255, go on with other names and digests.
_LONGEST_NAME = 80
_RESERVED = ("prompts", "responses", "messages", "source")


def source_problems(data: DataConfig) -> Iterator[str]:
    """Say of every source which of its options cannot be; and whether the weights make a mix."""
    if len(data.name.encode("utf-8", "replace")) > _LONGEST_NAME or not re.fullmatch(r"([\w+-][\w.+-]*)?", data.name):
        yield (
            f"data.name={shown_name(data.name):.{_LONGEST_NAME}}: must be at most {_LONGEST_NAME} letters, digits, _, "
            "-, + and dots, the first no dot: directories are called so"
        )
    for name, source in data.sources.items():
        yield from _source(source, f"data.sources.{name}")
    weights = {name: source.weight for name, source in data.sources.items()}
    given = [weight for weight in weights.values() if weight is not None]
    if given and len(given) < len(weights):
        unset = ", ".join(name for name, weight in weights.items() if weight is None)
        yield f"data.sources: {unset} has no weight while others have: set `weight` for all or for none"
    elif given and not any(given):
        yield "data.sources: every weight is 0, so the mix is empty: give at least one source a weight above 0"


def _source(source: SourceConfig, key: str) -> Iterator[str]:
    if source.kind not in source_kinds():
        yield f"{key}.kind={source.kind}: there is no such kind of source{did_you_mean(source.kind, source_kinds())}"
    if source.format not in (names := [AUTO, *format_names()]):
        yield f"{key}.format={source.format}: there is no such format{did_you_mean(source.format, names)}"
    elif source.kind != "film_reviews":
        forms = format_names() if source.format == AUTO else [source.format]
        known = {column for form in forms for column in format_module(form, key=f"{key}.format").COLUMNS}
        for column in source.columns:
            if column not in known:
                yield f"{key}.columns: format={source.format} reads no column {column}{did_you_mean(column, known)}"
    for column in source.keep:
        if column in _RESERVED:
            yield f"{key}.keep={source.keep}: a scorer is given {column} anyway, as something else: rename the column"
    for stage in source.stages:
        if stage not in STAGES:
            yield f"{key}.stages={source.stages}: there is no stage {stage}{did_you_mean(stage, STAGES)}"
    if source.markers and (len(source.markers) != 2 or not all(marker.strip() for marker in source.markers)):
        yield f"{key}.markers={source.markers}: must be two texts, the user's mark and the assistant's"
    if source.remove is not None:
        try:
            re.compile(source.remove)
        except re.error as error:
            yield f"{key}.remove={source.remove}: is no regular expression: {error}"
    if source.kind == "hub" and not source.path:
        yield f"{key}.path is not set: give ORG/NAME of the Hugging Face hub, as in  {key}.path=Anthropic/hh-rlhf"
    if source.kind == "file":
        yield from _file(source, key)


def _file(source: SourceConfig, key: str) -> Iterator[str]:
    if not source.path:
        yield f"{key}.path is not set: give a file or a directory, as in  {key}.path=FILE.jsonl"
        return
    path, given = Path(source.path).expanduser(), f"{key}.path={shown_name(source.path):.300}"
    try:
        kind = kind_of(path)
    except OSError as error:
        yield f"{given}: cannot be read: {error.strerror}"
        return
    if kind is None:
        folder = path.parent
        names = [entry.name for entry in folder.iterdir()] if folder.is_dir() and os.access(folder, os.R_OK) else []
        hint = did_you_mean(path.name, names)
        yield f"{given}: there is no such file{hint if 'did you mean' in hint else ''}"
    elif kind not in ("file", "directory"):
        yield f"{given}: is {kind}, not a regular file: give a file, or a directory of files"
