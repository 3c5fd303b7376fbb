"""Tokenised rows on disk: built once, found again by a fingerprint, memory-mapped by every rank."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.config.errors import ConfigError, DataError
from rlhf.config.schema import DataConfig, Unread
from rlhf.config.writing import whole_directory
from rlhf.data.build import build
from rlhf.data.conversation import Conversation
from rlhf.data.sources import read_sources, source_module
from rlhf.data.split import PTX, Part, part_of
from rlhf.models.tokenizer import load_tokenizer, tokenizer_digest

# The modules that decide which tokens a row has.
_TOKENS = ("tokenizer.py", "template.py", "turns.py", "targets.py")
# Those that decide which rows there are, beside the sources and the formats.
_READING = (
    "arrow_sizes.py",
    "bad_rows.py",
    "conversation.py",
    "messages.py",
    "detect.py",
    "json_rows.py",
    "parquet_pages.py",
    "readers.py",
    "row_files.py",
    "split.py",
    "tables.py",
    "text_files.py",
)


@dataclass(frozen=True, slots=True)
class PreparedData:
    """A prepared mix on disk. `counts` says how many rows there are, and how many were dropped or truncated and why."""

    directory: Path
    fingerprint: str
    counts: dict[str, Any]

    def part(self, stage: str, held_out: bool) -> Any:
        """The rows of a part as a memory-mapped `datasets.Dataset`; raises DataError if there is none.

        Columns: prompt_ids, chosen_ids, rejected_ids (lists of int; rejected_ids is None without a rejected answer),
        chosen_truncated, rejected_truncated, source, where, prompt_text, messages (the prompt's turns, {"role",
        "content", "fields"}), chosen_text, rejected_text, extra (JSON of the columns that the source keeps, or None),
        prompt_targets and answer_is_target (what SFT's loss is on: see collate_sft).
        """
        from datasets import Dataset

        part = Part(stage, held_out)
        if not self.counts["parts"][part.label]["rows"]:
            raise DataError(_empty_message(part, self.counts))
        rows = Dataset.from_file(str(self.directory / f"{part.label}.arrow"))
        return rows.select(np.load(self.directory / f"{part.label}.npy"))

    def has_part(self, stage: str, held_out: bool) -> bool:
        """Whether a part has rows."""
        return bool(self.counts["parts"][Part(stage, held_out).label]["rows"])

    def meta(self, stage: str, held_out: bool) -> Any:
        """What is remembered of a part's rows, in their order: source, tokens, digest … (see encode.META), [rows]."""
        return np.load(self.directory / f"{Part(stage, held_out).label}.meta.npy")

    @property
    def problems_file(self) -> Path:
        """A JSON-lines file that lists every row that was dropped or truncated."""
        return self.directory / "problems.jsonl"


def _empty_message(part: Part, counts: dict[str, Any]) -> str:
    what = "held-out" if part.held_out else "training"
    needed = "pairs of a chosen and a rejected answer" if part.stage == "rm" else "rows"
    remedy = "data.split.held_out" if part.held_out else f"data.split.{part.stage}"
    read = ", ".join(f"{number} of {name}" for name, number in counts["read"].items())
    if part.stage == PTX and not part.held_out:
        return f"the mix has no plain text (read: {read}): add a source with format=text"
    dropped = ", ".join(f"{number} ({reason})" for reason, number in counts["dropped"].items()) or "none"
    notes = "".join(f"\n  {note}" for note in counts["choices"])
    return (
        f"the {what} part of stage {part.stage} has no {needed} (read: {read}; dropped: {dropped}): add rows, or raise "
        f"{remedy}{notes}"
    )


def _plain(value: Any) -> Any:
    """A JSON-serialisable form of a dataclass's dict: enums by name."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return value.name if isinstance(value, Enum) else value


def _hash(*parts: object) -> str:
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=10).hexdigest()


def content_fingerprint(data: DataConfig) -> str:
    """Identify the rows before tokenisation: the sources' bytes, the options that choose rows, and the code."""
    if not data.sources:
        raise ConfigError("data.sources is empty: give at least one source")
    here = Path(__file__).parent
    code = [(here / name).read_text(encoding="utf-8") for name in _READING]
    for folder in ("sources", "formats"):
        code += [file.read_text(encoding="utf-8") for file in sorted((here / folder).glob("*.py"))]
    sources = {}
    for name, source in data.sources.items():
        digest = source_module(source.kind, key=f"data.sources.{name}.kind").content_digest(source, name=name)
        sources[name] = [digest, _plain(asdict(replace(source, weight=None, path=None)))]
    return _hash(code, sources, asdict(data.split), data.on_bad_row.name)


def _fingerprint(data: DataConfig, tokenizer_dir: Path) -> str:
    weights = {name: source.weight for name, source in data.sources.items()}
    limits = [data.max_prompt_length, data.max_response_length, data.on_long_prompt.name, data.sft_on_rejected]
    limits.append(data.loss_on.name)
    here = Path(__file__).parent
    names = ("prepare.py", "build.py", "encode.py", "mix.py", "template_check.py")
    code = [(here / name).read_text(encoding="utf-8") for name in names]
    code += [(here.parent / "models" / name).read_text(encoding="utf-8") for name in _TOKENS]
    code += [metadata.version(package) for package in ("datasets", "tokenizers", "transformers")]
    tokenizer = tokenizer_digest(load_tokenizer(tokenizer_dir))
    return _hash(code, content_fingerprint(data), weights, data.exhausted.name, limits, tokenizer)


def training_texts(data: DataConfig) -> Iterator[str]:
    """Prompts and answers of the training part of SFT: what a tokenizer may be trained on."""
    for entry in read_sources(data):
        if isinstance(entry, Conversation) and entry.messages and _is_demonstration(entry, data):
            yield entry.prompt_text
            yield from (text for text in (entry.chosen, entry.rejected) if text is not None)


def _is_demonstration(conversation: Conversation, data: DataConfig) -> bool:
    stages = data.sources[conversation.source].stages
    return part_of(conversation, data.split, stages=stages) == Part("sft", False)


def _check_unread(unread: dict[str, dict[str, int]], data: DataConfig) -> None:
    """Raise DataError for columns and keys that nobody read, if they are not to be."""
    if not unread or data.unread is not Unread.error:
        return
    listed = "\n  ".join(f"data.sources.{name}: {described_unread(found)}" for name, found in unread.items())
    raise DataError(
        f"data.unread=error: these columns and keys are read by nobody:\n  {listed}\n"
        "Name them in `columns` of the source where the format has a column for them, take them out of the rows, or "
        "set data.unread=list to train without them"
    )


def described_unread(found: dict[str, int], *, most: int = 8) -> str:
    """Columns and keys that nobody read, the commonest first, with the number of rows that have them."""
    ordered = sorted(found.items(), key=lambda entry: (-entry[1], entry[0]))
    more = f", and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(f"{name:.60} ({number} rows)" for name, number in ordered[:most]) + more


def prepare_data(data: DataConfig, *, tokenizer_dir: Path, cache_dir: Path) -> PreparedData:
    """Read, split, tokenise and mix the data, or find the result of having done so.

    The result lies in cache_dir/data/<name>-<fingerprint>/. Processes that ask for the same data at the same time
    wait for one that builds it. Raises DataError for rows and prompts that cannot be used (see DataConfig), and for
    files that change while they are read.
    """
    from filelock import FileLock

    fingerprint = _fingerprint(data, tokenizer_dir)
    target = cache_dir / "data" / f"{data.name or 'data'}-{fingerprint}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not (target / "counts.json").is_file():
            with whole_directory(target) as partial:
                build(data, tokenizer_dir, partial)
                if _fingerprint(data, tokenizer_dir) != fingerprint:
                    raise DataError(f"data={data.name}: its files changed while they were read: run it again")
    counts = json.loads((target / "counts.json").read_text(encoding="utf-8"))
    _check_unread(counts["unread_by_source"], data)
    return PreparedData(directory=target, fingerprint=fingerprint, counts=counts)
