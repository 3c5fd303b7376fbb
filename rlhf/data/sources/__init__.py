"""One module per kind of source. A module has these two functions and needs no registration:

    conversations(source: SourceConfig, *, name: str) -> Iterator[Conversation | Refused]
    content_digest(source: SourceConfig, *, name: str) -> str       a hash of everything that it reads

A module that can also supply an independent judge has the following, texts and their labels (1 = positive):

    judge_texts(*, held_out: bool) -> tuple[list[str], list[int]]
"""

import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType

from rlhf.config.errors import ConfigError, DataError
from rlhf.config.schema import OnProblem, SourceConfig
from rlhf.data.conversation import Conversation, Refused

LISTED_ROWS = 20


def source_kinds() -> list[str]:
    """The names of the modules in this package."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def source_module(kind: str, *, key: str) -> ModuleType:
    """Import the module of a kind of source; `key` is the configuration key to blame if there is none."""
    if kind not in source_kinds():
        raise ConfigError(f"{key}={kind}: no such kind of source; there are {', '.join(source_kinds())}")
    return importlib.import_module(f"{__name__}.{kind}")


def read_source(source: SourceConfig, *, name: str, on_bad_row: OnProblem) -> Iterator[Conversation | Refused]:
    """Yield a source's conversations, and the rows that give none.

    Raises DataError at the end of the source if there were bad rows and `on_bad_row` is error: the message lists the
    first 20. Raises DataError also if no row could be used.
    """
    module = source_module(source.kind, key=f"data.sources.{name}.kind")
    bad: list[str] = []
    number_bad = usable = 0
    for entry in module.conversations(source, name=name):
        if isinstance(entry, Conversation):
            usable += 1
        elif entry.bad:
            number_bad += 1
            if len(bad) < LISTED_ROWS:
                bad.append(f"{entry.where}: {entry.reason}")
        yield entry
    if number_bad and on_bad_row is OnProblem.error:
        more = f"\n  … and {number_bad - LISTED_ROWS} more" if number_bad > LISTED_ROWS else ""
        listed = "\n  ".join(bad)
        raise DataError(
            f"data.sources.{name}: {number_bad} rows cannot be used:\n  {listed}{more}\n"
            "Repair them, or set data.on_bad_row=skip to leave them out"
        )
    if not usable:
        first = f"; the first: {bad[0]}" if bad else ""
        raise DataError(
            f"data.sources.{name} ({source.path or source.kind}) has no usable row: add rows, or remove it{first}"
        )
