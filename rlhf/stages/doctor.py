"""mode=data: what the data of a run are, before anything is trained on them. Imports no torch."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from rlhf.config.errors import ConfigError, DataError
from rlhf.config.schema import Config
from rlhf.config.writing import whole_directory
from rlhf.data.inspector import QUANTILES, PartFacts, examples, lengths, overlaps, part_facts
from rlhf.data.prepare import PreparedData
from rlhf.data.split import ALL_PARTS
from rlhf.models.tokenizer import load_tokenizer
from rlhf.stages.preflight import Preflight, check_sizes, prepare
from rlhf.tracking.data_report import DataReport, as_text, draw_lengths, write_page

EXAMPLES = 3  # Of each part.
_PARTS = [
    "source",
    "part",
    "rows",
    "prompt tokens: 5 50 95 100 %",
    "answer tokens",
    "cut off (no EOS)",
    "loss tokens",
    "duplicates",
    "chosen longer",
    "languages",
]
_BIAS, _ENOUGH = 0.65, 100
_MUCH_CUT = 0.2


def examine(config: Config, folder: Path, *, colored: bool) -> str:
    """Prepare the data, write data.json, data.html, data.png and data.txt, and return the text for the terminal.

    Where a stage's part is empty or smaller than a batch, prints the text and raises DataError.
    """
    prepared = prepare(config)
    data = prepared.data
    tokenizer = load_tokenizer(prepared.tokenizer_dir)
    facts = list(part_facts(data))
    report = DataReport(
        name=config.data.name or "data",
        fingerprint=data.fingerprint,
        parts=[_PARTS, *(_cells(fact) for fact in facts)],
        sources=[["source", "dropped or cut off", "rows"], *_sources(data)],
        findings=[*findings(prepared, facts)],
        examples=list(examples(data, tokenizer, count=EXAMPLES)),
        problems_file=str(data.problems_file),
    )
    _write(report, data, facts, config, folder)
    text = as_text(report, colored=colored)
    try:
        check_sizes(data, config.stage)
    except DataError as error:
        print(text, flush=True)
        raise DataError(f"{error}\nWhat the data are: {folder / 'data.txt'}") from error
    return f"{text}\n\n# Written to {folder}"


def findings(prepared: Preflight, facts: list[PartFacts]) -> Iterator[str]:
    """What a person should look at, one sentence each."""
    yield from prepared.notes
    for fact in facts:
        where = f"{fact.source} in {fact.part}"
        if fact.longer_chosen is not None and fact.rows >= _ENOUGH and not 1 - _BIAS <= fact.longer_chosen <= _BIAS:
            side = "longer" if fact.longer_chosen > 0.5 else "shorter"
            share = max(fact.longer_chosen, 1 - fact.longer_chosen)
            yield f"{where}: the chosen answer is the {side} one in {share:.0%} of the pairs: length alone tells them"
        if fact.truncated > _MUCH_CUT:
            yield f"{where}: {fact.truncated:.0%} of the answers are cut off: raise data.max_response_length"
        if fact.duplicates > 0.01 * fact.rows:
            yield f"{where}: {fact.duplicates} of {fact.rows} rows occur more than once"
    common = overlaps(prepared.data)
    yield from (f"{number} prompts are in {parts}" for parts, number in common.items())
    if not common:
        yield "no prompt is trained on in two stages, or both trained on and held out"


def _cells(fact: PartFacts) -> list[str]:
    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.1%}"

    def quantiles(values: tuple[float, ...]) -> str:
        return " ".join(f"{value:.0f}" for value in values)

    languages = ", ".join(f"{name} {value:.0%}" for name, value in list(fact.languages.items())[:3])
    return [
        fact.source,
        fact.part,
        str(fact.rows),
        quantiles(fact.prompt_tokens),
        quantiles(fact.response_tokens),
        share(fact.truncated),
        share(fact.loss_share),
        str(fact.duplicates),
        share(fact.longer_chosen),
        languages,
    ]


def _sources(data: PreparedData) -> Iterator[list[str]]:
    counts = data.counts
    for source, number in counts["read"].items():
        yield [source, "(read)", str(number)]
        yield from ([source, reason, str(n)] for reason, n in counts["dropped_by_source"].get(source, {}).items())
        cut = counts["truncated_by_source"].get(source, {})
        yield from ([source, f"{which} answers cut off", str(n)] for which, n in cut.items())


def _write(report: DataReport, data: PreparedData, facts: list[PartFacts], config: Config, folder: Path) -> None:
    """Write the files; the folder appears complete or not at all."""
    drawn = {part.label: lengths(data, part) for part in ALL_PARTS if data.has_part(part.stage, part.held_out)}
    limit = config.data.max_response_length
    limits = {"prompt": config.data.max_prompt_length, "chosen": limit, "rejected": limit}
    content = {
        "fingerprint": data.fingerprint,
        "counts": data.counts,
        "quantiles": QUANTILES,
        "parts": [asdict(fact) for fact in facts],
        "overlaps": overlaps(data),
        "findings": report.findings,
    }
    try:
        with whole_directory(folder) as partial:
            draw_lengths(drawn, limits, partial / "data.png")
            write_page(report, partial / "data.png", partial / "data.html")
            (partial / "data.txt").write_text(as_text(report, colored=False) + "\n", encoding="utf-8")
            (partial / "data.json").write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"run_dir={folder.parent} cannot be written: {error.strerror}") from error
