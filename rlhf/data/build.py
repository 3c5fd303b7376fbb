"""Building a mix: rows stream from the sources through the tokenizer to disk, then each part is put in order.

No more than a few thousand rows, or a few dozen million characters, are in memory at a time, and 40 bytes of each row
that was written.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf.config.errors import DataError
from rlhf.config.schema import DataConfig, OnProblem
from rlhf.data.bad_rows import LISTED, BadRows, joined
from rlhf.data.conversation import Conversation, Refused
from rlhf.data.encode import BAD_ROW, META, Encoded, Encoder
from rlhf.data.mix import mix_order, mix_reports
from rlhf.data.sources import no_usable_row, read_sources, settled
from rlhf.data.split import ALL_PARTS
from rlhf.data.template_check import TemplateCheck
from rlhf.models.tokenizer import load_tokenizer

CHUNK = 1000
# Characters of a chunk, of which a long row may be one alone: their tokens may take three hundred times as many bytes.
CHUNK_TEXT = 4 * 1024**2
MOST_UNREAD = 200
# Chunks that are tokenised here before it pays to start other processes, which takes seconds.
ALONE = 30
# Characters of a reason in the list of problems.
_DETAIL = 2000


def features() -> Any:
    """The columns of a part."""
    from datasets import Features, List, Value

    ids, text, flag = List(Value("int32")), Value("string"), Value("bool")
    answer = {"ids": ids, "text": text, "truncated": flag}
    sides = {f"{side}_{key}": kind for side in ("chosen", "rejected") for key, kind in answer.items()}
    messages = List({"role": text, "content": text, "fields": text})
    named = {name: text for name in ("source", "where", "prompt_text", "extra")}
    targets = {"prompt_targets": ids, "answer_is_target": flag}
    return Features({"prompt_ids": ids, **sides, **targets, **named, "messages": messages})


@dataclass(slots=True)
class Tally:
    """What was read, dropped, truncated and not read, and what else is to be told."""

    read: Counter[str] = field(default_factory=Counter)
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)
    truncated: Counter[tuple[str, str]] = field(default_factory=Counter)
    unread: Counter[tuple[str, str]] = field(default_factory=Counter)
    notes: Counter[tuple[str, str]] = field(default_factory=Counter)
    long_prompts: list[str] = field(default_factory=list)
    # Rows that the chat template refuses, by source.
    bad_rows: dict[str, BadRows] = field(default_factory=dict)


class _Writer:
    """Appends encoded chunks to the parts' files, and problems to their list."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self._directory, self._stack = directory, stack
        self._features = features()
        self._writers: dict[str, Any] = {}
        self._problems = stack.enter_context((directory / "problems.jsonl").open("w", encoding="utf-8"))
        self.meta: dict[str, list[NDArray[Any]]] = {}
        self.tally = Tally()

    def add(self, encoded: Encoded) -> None:
        """Write a chunk."""
        from datasets.arrow_writer import ArrowWriter

        tally = self.tally
        tally.read.update(encoded.read)
        tally.dropped.update(encoded.dropped)
        tally.truncated.update(encoded.truncated)
        tally.notes.update(encoded.notes)
        for (source, name), number in encoded.unread.items():
            # Rows whose keys are numbers or names have no end of columns.
            known = len(tally.unread) < MOST_UNREAD or (source, name) in tally.unread
            tally.unread[source, name if known else "(others)"] += number
        for label, rows in encoded.rows.items():
            if label not in self._writers:
                path = str(self._directory / f"{label}.arrow")
                self._writers[label] = ArrowWriter(features=self._features, path=path, writer_batch_size=CHUNK)
            self._writers[label].write_batch({name: [row[name] for row in rows] for name in self._features})
            self.meta.setdefault(label, []).append(encoded.meta_array(label))
        for problem in encoded.problems:
            if problem["problem"] == "prompt too long":
                self.tally.long_prompts.append(f"{problem['source']}, {problem['where']}: {problem['detail']}")
            if problem["problem"] == BAD_ROW:
                self.tally.bad_rows.setdefault(problem["source"], BadRows()).add(problem["where"], problem["detail"])
            self.problem(problem)

    def refuse(self, refused: Refused) -> None:
        """Count and list a row that gave no conversation."""
        self.tally.read[refused.source] += 1
        kind = BAD_ROW if refused.bad else refused.reason
        self.tally.dropped[refused.source, kind] += 1
        entry = {"problem": kind, "source": refused.source, "where": refused.where}
        self.problem({**entry, "detail": refused.reason[:_DETAIL] if refused.bad else ""})

    def problem(self, entry: dict[str, Any]) -> None:
        """List one row."""
        self._problems.write(json.dumps(entry) + "\n")

    def finish(self) -> None:
        """Complete the parts' files."""
        for writer in self._writers.values():
            writer.finalize()


def build(data: DataConfig, tokenizer_dir: Path, directory: Path) -> None:
    """Write the parts' rows and orders, counts.json and problems.jsonl into an empty directory."""
    sources, notes = {}, []
    for name, source in data.sources.items():
        sources[name], told = settled(source, name=name)
        notes += told
    data = replace(data, sources=sources)
    with ExitStack() as stack:
        writer = _Writer(directory, stack)
        check = TemplateCheck(load_tokenizer(tokenizer_dir))
        problems: list[str] = []
        try:
            for encoded in _encoded(_read(data, writer.refuse, check, problems), data, tokenizer_dir):
                writer.add(encoded)
        finally:
            writer.finish()
        _check_rows(writer.tally, data, problems)
        meta = {label: np.concatenate(parts) for label, parts in writer.meta.items()}
        kept = _without_conflicts(meta, directory, writer)
        parts, reports = _ordered(data, meta, kept, directory, writer)
    counts = {
        "sources": list(data.sources),
        "read": dict(writer.tally.read),
        "parts": parts,
        "dropped": _by_reason(writer.tally.dropped),
        "truncated": _by_reason(writer.tally.truncated),
        "dropped_by_source": _by_source(writer.tally.dropped),
        "truncated_by_source": _by_source(writer.tally.truncated),
        "choices": notes,
        "unread_by_source": _by_source(writer.tally.unread),
        "notes": _by_reason(writer.tally.notes),
        "mix": reports,
        "template": check.findings(),
    }
    (directory / "counts.json").write_text(json.dumps(counts, indent=1, ensure_ascii=False), encoding="utf-8")


def _by_reason(counted: Counter[tuple[str, str]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for (_, reason), number in counted.items():
        total[reason] += number
    return dict(total)


def _by_source(counted: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for (source, reason), number in counted.items():
        found.setdefault(source, {})[reason] = number
    return found


def _read(
    data: DataConfig, refuse: Callable[[Refused], None], check: TemplateCheck, problems: list[str]
) -> Iterator[Conversation]:
    """The conversations of all sources; what is wrong with them is added to `problems` at the end.

    It is not raised: that would lose the chunk that has begun, and with it what the chat template refuses there.
    """
    try:
        for entry in read_sources(data):
            if isinstance(entry, Refused):
                refuse(entry)
                continue
            check.add(entry)
            yield entry
    except DataError as error:
        problems.append(str(error))


def _chunks(conversations: Iterator[Conversation]) -> Iterator[list[Conversation]]:
    """Chunks of bounded size, in order."""
    chunk: list[Conversation] = []
    size = 0
    for conversation in conversations:
        length = sum(len(message.content) for message in conversation.messages)
        length += len(conversation.chosen or "") + len(conversation.rejected or "")
        if chunk and (len(chunk) == CHUNK or size + length > CHUNK_TEXT):
            yield chunk
            chunk, size = [], 0
        chunk.append(conversation)
        size += length
    if chunk:
        yield chunk


def _encoded(conversations: Iterator[Conversation], data: DataConfig, tokenizer_dir: Path) -> Iterator[Encoded]:
    """The chunks in order; tokenised here, and by several processes if there are many."""
    chunks = _chunks(conversations)
    encoder = Encoder(data, load_tokenizer(tokenizer_dir))
    workers = data.workers or len(os.sched_getaffinity(0))
    alone = islice(chunks, ALONE) if workers > 1 else chunks
    yield from map(encoder.encode, alone)
    first = next(chunks, None)
    if first is None:
        return
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(data, tokenizer_dir)
    )
    try:
        waiting: list[Future[Encoded]] = [pool.submit(_work, first)]
        for chunk in chunks:
            waiting.append(pool.submit(_work, chunk))
            if len(waiting) > 2 * workers:
                yield waiting.pop(0).result()
        yield from (future.result() for future in waiting)
    finally:
        pool.shutdown(cancel_futures=True)


_ENCODER: list[Encoder] = []


def _start_worker(data: DataConfig, tokenizer_dir: Path) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # One thread for each process.
    _ENCODER[:] = [Encoder(data, load_tokenizer(tokenizer_dir))]


def _work(conversations: list[Conversation]) -> Encoded:
    return _ENCODER[0].encode(conversations)


def _check_rows(tally: Tally, data: DataConfig, problems: list[str]) -> None:
    """Raise DataError with these problems, and with those that the chat template and the limits found, unless skipped.

    A row that the template refuses is a bad row like any other. Bad rows may be skipped, but not all of a source.
    """
    for name, bad in tally.bad_rows.items():
        rows = tally.read[name]
        if data.on_bad_row is OnProblem.error:
            problems.append(bad.message(name, rows=rows))
        elif tally.dropped[name, BAD_ROW] == rows:
            problems.append(no_usable_row(data.sources[name], name, bad))
    if problems:
        raise DataError(joined(problems))
    if not tally.long_prompts or data.on_long_prompt is not OnProblem.error:
        return
    longest = max(int(entry.rsplit(" ", 2)[1]) for entry in tally.long_prompts)
    listed = "\n  ".join(tally.long_prompts[:LISTED])
    raise DataError(
        f"{len(tally.long_prompts)} rows have a prompt longer than data.max_prompt_length={data.max_prompt_length} "
        f"tokens (chat template included):\n  {listed}\n"
        f"Set data.max_prompt_length={longest} or more, or data.on_long_prompt=skip to leave them out"
    )


def _without_conflicts(meta: dict[str, NDArray[Any]], directory: Path, writer: _Writer) -> dict[str, NDArray[np.bool_]]:
    """Which rows are kept so that no prompt is in two parts and nothing is repeated; the others are listed.

    SFT has each answer to a prompt once, which may stand in several pairs, and PPO each prompt.

    A prompt can only be in the training parts of two stages if a source is limited to some. Rows of sources that are
    not so limited stay, then those of the earlier stage. The held-out prompts are the same for every stage.
    """
    kept = {label: np.ones(len(rows), dtype=bool) for label, rows in meta.items()}
    labels = [part.label for part in ALL_PARTS if part.stage != "ptx" and part.label in meta]
    trained = [label for label in labels if label.endswith("_train")]
    if any(not meta[label]["free"].all() for label in trained):
        digests = np.concatenate([meta[label]["digest"] for label in trained])
        # Rows of sources without limits come first, and of the others those of the first part.
        ranks = np.concatenate([np.where(meta[label]["free"], -1, number) for number, label in enumerate(trained)])
        places = np.concatenate([np.full(len(meta[label]), number) for number, label in enumerate(trained)])
        order = np.lexsort((ranks, digests))
        _, first, inverse = np.unique(digests[order], return_index=True, return_inverse=True)
        wanted = np.empty(len(order), dtype=places.dtype)
        wanted[order] = places[order][first][inverse]
        for number, label in enumerate(trained):
            mine = places == number
            kept[label] = wanted[mine] == number
            _list(directory, writer, label, ~kept[label], "prompt belongs to another stage")
    once = {"sft": ("identity", "sft: answer seen before"), "ppo": ("digest", "ppo: prompt seen before")}
    for label in labels:
        field_name, reason = once.get(label.partition("_")[0], ("", ""))
        if not field_name:
            continue
        usable = np.flatnonzero(kept[label])
        _, first = np.unique(meta[label][field_name][usable], return_index=True)
        seen = kept[label].copy()
        seen[usable[first]] = False
        _list(directory, writer, label, seen, reason)
        kept[label] &= ~seen
    return kept


def _list(directory: Path, writer: _Writer, label: str, which: NDArray[np.bool_], reason: str) -> None:
    """Count and list rows that were written but are not used."""
    if not which.any():
        return
    from datasets import Dataset

    rows = Dataset.from_file(str(directory / f"{label}.arrow")).select_columns(["source", "where", "prompt_text"])
    for row in rows.select(np.flatnonzero(which)):
        writer.tally.dropped[row["source"], reason] += 1
        entry = {"problem": reason, "part": label, "source": row["source"], "where": row["where"]}
        writer.problem({**entry, "prompt": row["prompt_text"][:2000]})


def _ordered(
    data: DataConfig,
    meta: dict[str, NDArray[Any]],
    kept: dict[str, NDArray[np.bool_]],
    directory: Path,
    writer: _Writer,
) -> tuple[dict[str, Any], list[str]]:
    """Write each part's order: of each source what its weight allows; held-out parts are kept whole."""
    names = list(data.sources)
    weights = {name: source.weight for name, source in data.sources.items()}
    described, reports = {}, []
    for part in ALL_PARTS:
        rows = meta.get(part.label, np.empty(0, dtype=META))
        usable = np.flatnonzero(kept[part.label]) if part.label in kept else np.empty(0, dtype=np.int64)
        available = {name: int((rows["source"][usable] == number).sum()) for number, name in enumerate(names)}
        order = mix_order(
            rows[usable], available, {name: None for name in weights} if part.held_out else weights, data.exhausted
        )
        order = usable[order]
        beyond = kept[part.label].copy() if part.label in kept else np.zeros(0, dtype=bool)
        beyond[order] = False
        _list(directory, writer, part.label, beyond, "beyond the source's weight")
        taken = {name: int((rows["source"][order] == number).sum()) for number, name in enumerate(names)}
        if not part.held_out:
            reports += mix_reports(part.label, available, taken)
        np.save(directory / f"{part.label}.npy", order.astype(np.int64))
        np.save(directory / f"{part.label}.meta.npy", rows[order])
        described[part.label] = _described(rows[order], {name: count for name, count in taken.items() if count})
    return described, reports


def _described(rows: NDArray[Any], sources: dict[str, int]) -> dict[str, Any]:
    return {
        "rows": len(rows),
        "pairs": int(rows["pair"].sum()),
        "prompts": len(np.unique(rows["digest"])),
        "response_tokens": int(rows["tokens"].sum()),
        "sources": sources,
    }
