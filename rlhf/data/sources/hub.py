"""Data sets of the Hugging Face hub, through `datasets`: never with code of theirs, offline from its cache."""

from collections.abc import Iterator
from typing import Any

from rlhf.config.errors import ConfigError, DataError
from rlhf.config.schema import SourceConfig
from rlhf.data.conversation import Conversation, Refused
from rlhf.data.formats import conversations as converted

_BATCH = 1000


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


def conversations(source: SourceConfig, *, name: str) -> Iterator[Conversation | Refused]:
    """Yield the rows of one split in the source's format."""
    dataset = _load(source, name=name)
    where = f"{source.path} [{source.split}]"

    def rows() -> Iterator[tuple[str, Any] | Refused]:
        number = 0
        for columns in dataset.iter(batch_size=_BATCH):
            for values in zip(*columns.values(), strict=True):
                number += 1
                yield f"{where} row {number}", dict(zip(columns, values, strict=True))

    return converted(rows(), source, name=name)


def content_digest(source: SourceConfig, *, name: str) -> str:
    """The fingerprint that `datasets` has of the data set's files and split."""
    dataset = _load(source, name=name)
    return f"{source.path} {source.split} {dataset._fingerprint} {len(dataset)}"
