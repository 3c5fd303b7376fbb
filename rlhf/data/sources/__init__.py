"""One module per kind of source. A module needs no registration. It has

    content_digest(source: SourceConfig, *, name: str) -> str       a hash of everything that it reads

and either of these; of the second kind the rows are read in the source's format:

    conversations(source: SourceConfig, *, name: str) -> Iterator[Conversation | Refused]
    rows_by_file(source: SourceConfig, *, name: str) -> Iterator[tuple[str, Rows]]
    left_out(source: SourceConfig, *, name: str) -> str             what is not read of what the source names, if any

A module that can also supply an independent judge has the following, texts and their labels (1 = positive):

    judge_texts(*, held_out: bool) -> tuple[list[str], list[int]]
"""

import importlib
import pkgutil
from collections.abc import Iterator
from functools import cache
from itertools import chain
from types import ModuleType

from rlhf.config.errors import ConfigError, DataError
from rlhf.config.schema import AUTO, DataConfig, OnProblem, SourceConfig
from rlhf.config.terminal import shown_name
from rlhf.data.bad_rows import BadRows, joined
from rlhf.data.conversation import Conversation, Refused
from rlhf.data.detect import choose_format
from rlhf.data.formats import conversations as converted


@cache
def source_kinds() -> list[str]:
    """The names of the modules in this package."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def source_module(kind: str, *, key: str) -> ModuleType:
    """Import the module of a kind of source; `key` is the configuration key to blame if there is none."""
    if kind not in source_kinds():
        raise ConfigError(f"{key}={kind}: no such kind of source; there are {', '.join(source_kinds())}")
    return importlib.import_module(f"{__name__}.{kind}")


def settled(source: SourceConfig, *, name: str) -> tuple[SourceConfig, list[str]]:
    """The source with its format, and what to tell of it: which format was taken and why, and what is not read."""
    module = source_module(source.kind, key=f"data.sources.{name}.kind")
    if not hasattr(module, "rows_by_file"):
        return source, []
    notes = [left] if (left := module.left_out(source, name=name)) else []
    if source.format == AUTO:
        source, reason = choose_format(module.rows_by_file(source, name=name), source, name=name)
        notes.append(reason)
    return source, [f"{name}: {note}" for note in notes]


def read_source(source: SourceConfig, *, name: str, on_bad_row: OnProblem) -> Iterator[Conversation | Refused]:
    """Yield a source's conversations, and the rows that give none.

    Raises DataError at the end of the source if there were bad rows and `on_bad_row` is error: what is wrong with many
    rows is told once. Raises DataError also if no row could be used.
    """
    module = source_module(source.kind, key=f"data.sources.{name}.kind")
    if hasattr(module, "rows_by_file"):
        source, _ = settled(source, name=name)
        rows = chain.from_iterable(rows for _, rows in module.rows_by_file(source, name=name))
        entries = converted(rows, source, name=name)
    else:
        entries = module.conversations(source, name=name)
    bad, unusable, usable = BadRows(), BadRows(), 0
    for entry in entries:
        if isinstance(entry, Conversation):
            usable += 1
        else:
            unusable.add(entry.where, entry.reason)
            if entry.bad:
                bad.add(entry.where, entry.reason)
        yield entry
    if bad.number and on_bad_row is OnProblem.error:
        raise DataError(bad.message(name, rows=usable + unusable.number))
    if not usable:
        raise DataError(no_usable_row(source, name, unusable))


def no_usable_row(source: SourceConfig, name: str, unusable: BadRows) -> str:
    """What is told of a source that gives nothing."""
    told = f":\n  {unusable.listed()}" if unusable.number else ": there are no rows"
    return f"data.sources.{name} ({shown_name(source.path or source.kind)}) has no usable row{told}"


def read_sources(data: DataConfig) -> Iterator[Conversation | Refused]:
    """Yield what every source has, in their order; raises DataError at the end with what is wrong with any of them."""
    problems = []
    for name, source in data.sources.items():
        try:
            yield from read_source(source, name=name, on_bad_row=data.on_bad_row)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError(joined(problems))
