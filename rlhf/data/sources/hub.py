"""Data sets of the Hugging Face hub, through `datasets`: never with code of theirs, offline from its cache."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from rlhf.config.errors import ConfigError, DataError
from rlhf.config.schema import SourceConfig
from rlhf.data.conversation import Refused
from rlhf.data.tables import batch_rows
from rlhf.data.text_files import Rows

_BATCH = 100


def _load(source: SourceConfig, *, name: str) -> Any:
    from datasets import disable_progress_bars, enable_progress_bars, is_progress_bar_enabled, load_dataset

    key = f"data.sources.{name}"
    if not source.path:
        raise ConfigError(f"{key}.path is not set: give it ORG/NAME of the Hugging Face hub")
    shown = is_progress_bar_enabled()
    disable_progress_bars()
    try:
        return load_dataset(source.path, name=source.subset, split=source.split, revision=source.revision)
    except Exception as error:  # `datasets` lets errors of a dozen libraries through.
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        where = " ".join(str(part) for part in (source.path, source.subset, source.split, source.revision) if part)
        raise DataError(
            f"{key}: {where} could not be loaded: {reason}\n"
            "Check path, subset, split and revision and the connection to the hub; a set that was loaded before is "
            "found in the cache without one. A set that comes with code of its own is read from "
            f"{key}.revision=refs/convert/parquet"
        ) from error
    finally:
        if shown:
            enable_progress_bars()


def rows_by_file(source: SourceConfig, *, name: str) -> Iterator[tuple[str, Rows]]:
    """The rows of one split, as those of one file."""
    where = f"{source.path} [{source.split}]"
    tables = _load(source, name=name).with_format("arrow").iter(batch_size=_BATCH)
    batches = (batch for table in tables for batch in table.to_batches())
    rows = batch_rows(batches, source.max_row_bytes, place=f"{where} row")
    yield where, (replace(entry, source=name) if isinstance(entry, Refused) else entry for entry in rows)


def left_out(source: SourceConfig, *, name: str) -> str:
    """A split is read whole."""
    return ""


def content_digest(source: SourceConfig, *, name: str) -> str:
    """The fingerprint that `datasets` has of the data set's files and split."""
    dataset = _load(source, name=name)
    return f"{source.path} {source.split} {dataset._fingerprint} {len(dataset)}"
