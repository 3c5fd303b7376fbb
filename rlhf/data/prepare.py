"""Tokenised rows on disk: built once, found again by a fingerprint, memory-mapped by every rank."""

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

import rlhf.data.sources
from rlhf.config.errors import ConfigError, DataError
from rlhf.config.schema import DataConfig, OnProblem
from rlhf.data.conversation import Conversation
from rlhf.data.mix import mix_reports, mix_sizes
from rlhf.data.sources import read_source, source_module
from rlhf.data.split import ALL_PARTS, Part, assign, uniform
from rlhf.models.tokenizer import encode_prompts, encode_responses, load_tokenizer, template_agrees, tokenizer_digest

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class PreparedData:
    """A prepared mix on disk. `counts` says how many rows there are, and how many were dropped or truncated and why."""

    directory: Path
    fingerprint: str
    counts: dict[str, Any]

    def part(self, stage: str, held_out: bool) -> Any:
        """The rows of a part as a memory-mapped `datasets.Dataset`; raises DataError if there is none.

        Columns: prompt_ids, chosen_ids, rejected_ids (lists of int; rejected_ids is None without a rejected answer),
        chosen_truncated, rejected_truncated, source, prompt_text, messages (the prompt's turns, {"role", "content"}),
        chosen_text, rejected_text.
        """
        from datasets import load_from_disk

        part = Part(stage, held_out)
        if not self.counts["parts"][part.label]["rows"]:
            raise DataError(_empty_message(part, self.counts))
        return load_from_disk(str(self.directory / part.label))

    def has_part(self, stage: str, held_out: bool) -> bool:
        """Whether a part has rows."""
        return bool(self.counts["parts"][Part(stage, held_out).label]["rows"])

    @property
    def problems_file(self) -> Path:
        """A JSON-lines file that lists every row that was dropped or truncated."""
        return self.directory / "problems.jsonl"


def _empty_message(part: Part, counts: dict[str, Any]) -> str:
    what = "held-out" if part.held_out else "training"
    needed = "pairs of a chosen and a rejected answer" if part.stage == "rm" else "rows"
    remedy = "data.split.held_out" if part.held_out else f"data.split.{part.stage}"
    return (
        f"the {what} part of stage {part.stage} has no {needed} (read: {counts['read']}, "
        f"dropped: {counts['dropped']}): add rows, or raise {remedy}"
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
    here = Path(rlhf.data.sources.__file__).parent
    code = [file.read_text(encoding="utf-8") for file in (*sorted(here.glob("*.py")), here.parent / "split.py")]
    sources = {}
    for name, source in data.sources.items():
        digest = source_module(source.kind, key=f"data.sources.{name}.kind").content_digest(source, name=name)
        sources[name] = [digest, _plain(asdict(replace(source, weight=None, path=None)))]
    return _hash(code, sources, asdict(data.split), data.on_bad_row.name)


def _fingerprint(data: DataConfig, tokenizer_dir: Path) -> str:
    weights = {name: source.weight for name, source in data.sources.items()}
    limits = [data.max_prompt_length, data.max_response_length, data.on_long_prompt.name, data.sft_on_rejected]
    here = Path(__file__).parent
    code = [(here / name).read_text(encoding="utf-8") for name in ("prepare.py", "mix.py")]
    return _hash(code, content_fingerprint(data), weights, limits, tokenizer_digest(load_tokenizer(tokenizer_dir)))


def read_conversations(data: DataConfig, *, bad_rows: list[str]) -> Iterator[tuple[Part, Conversation]]:
    """All sources' conversations, each with the part that its prompt belongs to."""
    for name, source in data.sources.items():
        for conversation in read_source(source, name=name, on_bad_row=data.on_bad_row, bad_rows=bad_rows):
            yield assign(conversation.messages, data.split), conversation


def training_texts(data: DataConfig) -> Iterator[str]:
    """Prompts and answers of the training part of SFT: what a tokenizer may be trained on."""
    for part, conversation in read_conversations(data, bad_rows=[]):
        if part == Part("sft", False):
            yield conversation.prompt_text
            yield from (text for text in (conversation.chosen, conversation.rejected) if text is not None)


@dataclass(slots=True)
class _Builder:
    """Collects rows by part, and what happened to the others."""

    data: DataConfig
    tokenizer: Any
    rows: dict[str, list[Row]] = field(default_factory=lambda: {part.label: [] for part in ALL_PARTS})
    read: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: Counter[str] = field(default_factory=Counter)
    problems: list[Row] = field(default_factory=list)

    def note(self, kind: str, conversation: Conversation, part: Part, detail: str = "") -> None:
        """List a row among the problems."""
        entry = {"problem": kind, "part": part.label, "source": conversation.source, "where": conversation.where}
        self.problems.append({**entry, "prompt": conversation.prompt_text, "detail": detail})

    def add_all(self, items: list[tuple[Part, Conversation]]) -> None:
        """Tokenise everything at once and hand each conversation to its part."""
        unique = list({conversation.messages: None for _, conversation in items})
        prompts = dict(zip(unique, encode_prompts(self.tokenizer, unique), strict=True))
        self._check_lengths(items, prompts)
        texts = list({t.strip(): None for _, c in items for t in (c.chosen, c.rejected) if t is not None})
        answers = dict(zip(texts, encode_responses(self.tokenizer, texts), strict=True))
        seen: set[Any] = set()
        for part, conversation in items:
            self.read[conversation.source] += 1
            prompt_ids = prompts[conversation.messages]
            if len(prompt_ids) > self.data.max_prompt_length:
                self.dropped["prompt too long"] += 1
                self.note("prompt too long", conversation, part, f"{len(prompt_ids)} tokens")
                continue
            row = self._row(part, conversation, prompt_ids, answers)
            getattr(self, f"_add_{part.stage}")(part, conversation, row, seen)

    def _check_lengths(self, items: list[tuple[Part, Conversation]], prompts: dict[Any, list[int]]) -> None:
        limit = self.data.max_prompt_length
        long = [c for _, c in items if len(prompts[c.messages]) > limit]
        if long and self.data.on_long_prompt is OnProblem.error:
            longest = max(len(prompts[c.messages]) for c in long)
            listed = "\n  ".join(f"{c.source}, {c.where}: {len(prompts[c.messages])} tokens" for c in long[:5])
            raise DataError(
                f"{len(long)} rows have a prompt longer than data.max_prompt_length={limit} tokens "
                f"(chat template included):\n  {listed}\n"
                f"Set data.max_prompt_length={longest} or more, or data.on_long_prompt=skip to leave them out"
            )

    def _row(self, part: Part, conversation: Conversation, prompt_ids: list[int], answers: dict[str, list[int]]) -> Row:
        row: Row = {"prompt_ids": prompt_ids, "source": conversation.source, "prompt_text": conversation.prompt_text}
        row["messages"] = [asdict(message) for message in conversation.messages]
        limit = self.data.max_response_length
        for side, text in (("chosen", conversation.chosen), ("rejected", conversation.rejected)):
            stripped = None if text is None else text.strip()
            ids = None if stripped is None else answers[stripped]
            is_long = ids is not None and len(ids) > limit
            row |= {f"{side}_text": stripped, f"{side}_truncated": is_long}
            # A truncated answer keeps no EOS: it did not end there.
            row[f"{side}_ids"] = ids[:limit] if ids is not None else None
            if is_long and ids is not None:
                self.truncated[f"{part.label} {side}"] += 1
                self.note(f"{side} answer truncated", conversation, part, f"{len(ids)} tokens")
        return row

    def _add_sft(self, part: Part, conversation: Conversation, row: Row, seen: set[Any]) -> None:
        if row["chosen_ids"] is None:
            self.dropped["sft: no answer"] += 1
            return
        self._append(part, {**row, **_no_rejected()})
        if self.data.sft_on_rejected and row["rejected_ids"] is not None:
            chosen = {f"chosen_{key}": row[f"rejected_{key}"] for key in ("ids", "text", "truncated")}
            self._append(part, {**row, **chosen, **_no_rejected()})

    def _add_rm(self, part: Part, conversation: Conversation, row: Row, seen: set[Any]) -> None:
        if row["rejected_ids"] is None:
            # Not listed as a problem: the source never claimed to have a pair here.
            self.dropped["rm: no rejected answer"] += 1
            return
        reason = None
        if row["chosen_text"] == row["rejected_text"]:
            reason = "rm: both answers equal"
        elif row["chosen_truncated"] or row["rejected_truncated"]:
            # The score is read at EOS, which a truncated answer does not have.
            reason = "rm: an answer is truncated"
        if reason:
            self.dropped[reason] += 1
            self.note(reason, conversation, part)
        else:
            self._append(part, row)

    def _add_ppo(self, part: Part, conversation: Conversation, row: Row, seen: set[Any]) -> None:
        if conversation.messages in seen:
            self.dropped["ppo: prompt seen before"] += 1
            return
        seen.add(conversation.messages)
        self._append(part, row)

    def _append(self, part: Part, row: Row) -> None:
        self.rows[part.label].append(row)

    def mix(self) -> tuple[dict[str, list[Row]], list[str]]:
        """Order the rows by a hash and take of each source what its weight allows; held-out parts are kept whole."""
        weights = {name: source.weight for name, source in self.data.sources.items()}
        mixed, reports = {}, []
        for part in ALL_PARTS:
            ordered = sorted(self.rows[part.label], key=lambda row: _hash_of_row("choose", row))
            available = {name: sum(row["source"] == name for row in ordered) for name in weights}
            taken = available if part.held_out else mix_sizes(available, weights)
            if not part.held_out:
                reports += mix_reports(part.label, available, taken)
            # Another hash: the rows kept of a source that gives up many would else all stand at the beginning.
            kept = _first_of_each(ordered, taken)
            mixed[part.label] = sorted(kept, key=lambda row: _hash_of_row("order", row))
        return mixed, reports


def _no_rejected() -> Row:
    return {"rejected_ids": None, "rejected_text": None, "rejected_truncated": False}


def _hash_of_row(purpose: str, row: Row) -> float:
    return uniform(
        json.dumps([purpose, *(row[key] for key in ("prompt_text", "chosen_text", "rejected_text", "source"))])
    )


def _first_of_each(rows: Iterable[Row], sizes: dict[str, int]) -> Iterator[Row]:
    taken: Counter[str] = Counter()
    for row in rows:
        if taken[row["source"]] < sizes[row["source"]]:
            taken[row["source"]] += 1
            yield row


def _features() -> Any:
    from datasets import Features, List, Value

    ids, text, flag = List(Value("int32")), Value("string"), Value("bool")
    answer = {"ids": ids, "text": text, "truncated": flag}
    sides = {f"{side}_{key}": kind for side in ("chosen", "rejected") for key, kind in answer.items()}
    messages = List({"role": text, "content": text})
    return Features({"prompt_ids": ids, **sides, "source": text, "prompt_text": text, "messages": messages})


def _write_rows(rows: list[Row], directory: Path) -> None:
    from datasets import Dataset, disable_progress_bars, enable_progress_bars, is_progress_bar_enabled

    features = _features()
    columns = {name: [row[name] for row in rows] for name in features}
    shown = is_progress_bar_enabled()
    disable_progress_bars()
    try:
        Dataset.from_dict(columns, features=features).save_to_disk(str(directory))
    finally:
        if shown:
            enable_progress_bars()


def _counts(builder: _Builder, parts: dict[str, list[Row]], reports: list[str], bad_rows: list[str]) -> dict[str, Any]:
    def describe(rows: list[Row]) -> dict[str, Any]:
        return {
            "rows": len(rows),
            "pairs": sum(row["rejected_ids"] is not None for row in rows),
            "prompts": len({row["prompt_text"] for row in rows}),
            "response_tokens": sum(len(row["chosen_ids"] or ()) + len(row["rejected_ids"] or ()) for row in rows),
            "sources": dict(Counter(row["source"] for row in rows)),
        }

    return {
        "read": dict(builder.read),
        "parts": {label: describe(rows) for label, rows in parts.items()},
        "dropped": {**builder.dropped, **({"bad row": len(bad_rows)} if bad_rows else {})},
        "truncated": dict(builder.truncated),
        "mix": reports,
    }


def _build(data: DataConfig, tokenizer_dir: Path, directory: Path) -> None:
    """Write the parts, counts.json and problems.jsonl into an empty directory."""
    bad_rows: list[str] = []
    items = list(read_conversations(data, bad_rows=bad_rows))
    builder = _Builder(data=data, tokenizer=load_tokenizer(tokenizer_dir))
    builder.add_all(items)
    parts, reports = builder.mix()
    counts = _counts(builder, parts, reports, bad_rows)
    probe = items[0][1]
    counts["template_agrees"] = template_agrees(builder.tokenizer, probe.messages, (probe.chosen or "yes").strip())
    for label, rows in parts.items():
        _write_rows(rows, directory / label)
    lines = [*builder.problems, *({"problem": "bad row", "where": row} for row in bad_rows)]
    with (directory / "problems.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (directory / "counts.json").write_text(json.dumps(counts, indent=1, ensure_ascii=False), encoding="utf-8")


def prepare_data(data: DataConfig, *, tokenizer_dir: Path, cache_dir: Path) -> PreparedData:
    """Read, split, tokenise and mix the data, or find the result of having done so.

    The result lies in cache_dir/data/<name>-<fingerprint>/. Processes that ask for the same data at the same time
    wait for one that builds it. Raises DataError for rows and prompts that cannot be used (see DataConfig).
    """
    from filelock import FileLock

    fingerprint = _fingerprint(data, tokenizer_dir)
    target = cache_dir / "data" / f"{data.name or 'data'}-{fingerprint}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not (target / "counts.json").is_file():
            temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
            try:
                _build(data, tokenizer_dir, temporary)
                temporary.chmod(0o755)
                os.rename(temporary, target)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    counts = json.loads((target / "counts.json").read_text(encoding="utf-8"))
    return PreparedData(directory=target, fingerprint=fingerprint, counts=counts)
