"""What is in prepared data: lengths, truncation, duplicates, overlaps, languages, and examples with their loss mask."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf.data.language import language_shares
from rlhf.data.loader import column_lengths, fetch_rows
from rlhf.data.prepare import PreparedData
from rlhf.data.split import ALL_PARTS, Part

QUANTILES = (0.05, 0.5, 0.95, 1.0)
_TEXTS = 2000  # Texts of which the language is guessed, at most, spread over the part.


@dataclass(frozen=True, kw_only=True, slots=True)
class PartFacts:
    """One source's rows in one part. Lengths are in tokens; quantiles are those of QUANTILES.

    loss_share: targets among all tokens (sft and ptx). truncated: answers that were cut, which therefore lack their
    EOS, among all answers. duplicates: rows whose prompt and answers occurred before. longer_chosen: pairs whose chosen
    answer has more tokens, among those that differ in length.
    """

    source: str
    part: str
    rows: int
    prompt_tokens: tuple[float, ...]
    response_tokens: tuple[float, ...]
    truncated: float
    loss_share: float | None
    duplicates: int
    longer_chosen: float | None
    languages: dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A row as the model sees it: pieces of text, each with whether the loss is on it."""

    part: str
    source: str
    where: str
    title: str
    pieces: tuple[tuple[str, bool], ...]


def part_facts(prepared: PreparedData) -> Iterator[PartFacts]:
    """The facts of every part that has rows, by source."""
    for part in ALL_PARTS:
        if not prepared.has_part(part.stage, part.held_out):
            continue
        rows, meta = prepared.part(part.stage, part.held_out), prepared.meta(part.stage, part.held_out)
        for number, source in enumerate(prepared.counts["sources"]):
            mine = np.flatnonzero(meta["source"] == number)
            if len(mine):
                yield _facts(rows, mine, meta[mine], part, source)


def _facts(rows: Any, mine: NDArray[np.int64], meta: NDArray[Any], part: Part, source: str) -> PartFacts:
    prompt, chosen, rejected = (column_lengths(rows, f"{name}_ids")[mine] for name in ("prompt", "chosen", "rejected"))
    pairs = meta["pair"]
    answers = np.concatenate([chosen[chosen > 0], rejected[pairs]])
    cut = sum(_count(rows, f"{side}_truncated", mine) for side in ("chosen", "rejected"))
    differ = pairs & (chosen != rejected)
    sample = mine[:: max(1, len(mine) // _TEXTS)]
    texts = (row["prompt_text"] + "\n" + (row["chosen_text"] or "") for row in fetch_rows(rows, sample))
    total = int((prompt + chosen).sum())
    targets = _target_count(rows, mine, chosen) if part.stage in ("sft", "ptx") and total else 0
    return PartFacts(
        source=source,
        part=part.label,
        rows=len(mine),
        prompt_tokens=_quantiles(prompt),
        response_tokens=_quantiles(answers),
        truncated=cut / max(1, len(answers)),
        loss_share=targets / total if part.stage in ("sft", "ptx") and total else None,
        duplicates=len(meta) - len(np.unique(meta["identity"])),
        longer_chosen=float((chosen > rejected)[differ].mean()) if differ.any() else None,
        languages=language_shares(texts),
    )


def _count(rows: Any, column: str, mine: NDArray[np.int64]) -> int:
    """True entries of a column of flags."""
    return int(np.asarray(rows.with_format("numpy")[column], dtype=bool)[mine].sum())


def _target_count(rows: Any, mine: NDArray[np.int64], chosen: NDArray[np.int64]) -> int:
    """Tokens that SFT's loss is on: those of answers that are learnt, and of earlier answers within the prompts."""
    learnt = np.asarray(rows.with_format("numpy")["answer_is_target"], dtype=bool)[mine]
    within = mine[column_lengths(rows, "prompt_targets")[mine] > 0]
    places = (row["prompt_targets"] for row in fetch_rows(rows.select_columns(["prompt_targets"]), within))
    earlier: int = sum(sum(own[1::2]) - sum(own[::2]) for own in places)
    return int(chosen[learnt].sum()) + earlier


def _quantiles(values: NDArray[np.int64]) -> tuple[float, ...]:
    return tuple(float(value) for value in np.quantile(values, QUANTILES)) if len(values) else ()


def overlaps(prepared: PreparedData) -> dict[str, int]:
    """Prompts that two stages train on, or that are trained on and held out, by the parts' names: there should be none.

    The held-out prompts are the same for every stage.
    """
    digests = {
        part.label: np.unique(prepared.meta(part.stage, part.held_out)["digest"])
        for part in ALL_PARTS
        if prepared.has_part(part.stage, part.held_out)
    }
    labels = list(digests)
    return {
        f"{one} and {other}": common
        for index, one in enumerate(labels)
        for other in labels[index + 1 :]
        if not (one.endswith("held_out") and other.endswith("held_out"))
        if (common := len(np.intersect1d(digests[one], digests[other])))
    }


def lengths(prepared: PreparedData, part: Part) -> dict[str, NDArray[np.int64]]:
    """Tokens of every prompt, chosen and rejected answer of a part, for a histogram."""
    rows = prepared.part(part.stage, part.held_out)
    found = {name: column_lengths(rows, f"{name}_ids") for name in ("prompt", "chosen", "rejected")}
    return {name: values[values > 0] for name, values in found.items() if (values > 0).any()}


def examples(prepared: PreparedData, tokenizer: Any, *, count: int) -> Iterator[Example]:
    """The first rows of every training part; the loss is on what SFT learns, the score is read at a pair's last token.

    In PPO's prompts nothing is learnt: the policy writes the answers itself.
    """
    for part in ALL_PARTS:
        if part.held_out or not prepared.has_part(part.stage, part.held_out):
            continue
        rows = prepared.part(part.stage, part.held_out)
        for row in rows.select(range(min(count, len(rows)))):
            for title, targets in _targets(part, row):
                ids = [*row["prompt_ids"], *(row[f"{title}_ids"] or () if title != "prompt" else ())]
                pieces = tuple(_pieces(tokenizer, ids, targets))
                shown = "answer" if part.stage == "sft" else title
                yield Example(part=part.label, source=row["source"], where=row["where"], title=shown, pieces=pieces)


def _targets(part: Part, row: dict[str, Any]) -> Iterator[tuple[str, Collection[int]]]:
    """Which answers of a row a stage reads, and the positions that its loss is on."""
    start = len(row["prompt_ids"])
    if part.stage == "ppo":
        yield "prompt", range(0)
    elif part.stage == "rm":
        for side in ("chosen", "rejected"):
            end = start + len(row[f"{side}_ids"])
            yield side, range(end - 1, end)
    else:
        places = row["prompt_targets"]
        earlier = {place for pair in zip(places[::2], places[1::2], strict=True) for place in range(*pair)}
        end = start + len(row["chosen_ids"]) if row["answer_is_target"] else start
        # The very first token of a plain text is predicted from nothing.
        yield "chosen", earlier | set(range(max(start, 1), end))


def _pieces(tokenizer: Any, ids: Sequence[int], targets: Collection[int]) -> Iterator[tuple[str, bool]]:
    """Decoded runs of tokens that have the loss on them and runs that have not."""
    run: list[int] = []
    for position, token in enumerate(ids):
        run.append(token)
        last = position + 1 == len(ids)
        if last or (position in targets) != (position + 1 in targets):
            yield tokenizer.decode(run, skip_special_tokens=False), position in targets
            run = []
