"""What a report says, gathered from a run directory's files alone: nothing here knows how it will look."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhf.config.files import to_plain
from rlhf.config.schema import Config
from rlhf.tracking.labels import format_change, format_value, full_label, label, verdict
from rlhf.tracking.recorder import format_seconds
from rlhf.tracking.records import COMMAND, CONFIG, METRICS, SAMPLES, STAGES, SUMMARY, read_json, read_rows

TITLES = {
    "sft": "Supervised fine-tuning",
    "rm": "Reward model",
    "ppo": "PPO",
    "reinforce_pp": "REINFORCE++",
    "best_of_n": "Best of n",
    "pipeline": "Pipeline",
}
_SAMPLE_COUNT = 10
_KNOWN_FACTS = {"stage", "started", "seconds", "phases", "before", "after", "data", "versions", "git_commit"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A metric before and after a stage, as text. `verdict` is better, worse or empty."""

    label: str
    before: str
    after: str
    change: str
    verdict: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """Time of a part of a stage; `share` is of the whole stage, 0 to 1."""

    name: str
    time: str
    share: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One response. `model` is sft, ppo, chosen, …; `score` is a number as text, or empty."""

    model: str
    text: str
    score: str
    tokens: int | None
    ended: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A prompt and its responses, in the order of the stage's models."""

    prompt: str
    answers: list[Answer]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageReport:
    """All that is said about one stage. `status` is finished, failed, unfinished or missing."""

    name: str
    title: str
    directory: Path
    status: str
    problem: str
    traceback: str
    started: str
    time: str
    seconds: float
    phases: list[Phase]
    comparisons: list[Comparison]
    questions: list[Question]
    facts: list[tuple[str, str]]
    counts: str
    model: Path | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """An option of the run: its dotted name, its value, and the default if that differs."""

    name: str
    value: str
    default: str


def is_pipeline(run_dir: Path) -> bool:
    """Whether the directory holds a pipeline rather than one stage."""
    stage = read_config_values(run_dir).get("stage")
    if isinstance(stage, dict) and stage.get("name"):
        return bool(stage["name"] == "pipeline")
    return any((run_dir / name / CONFIG).exists() or (run_dir / name / METRICS).exists() for name in STAGES)


def stage_name(run_dir: Path) -> str:
    """The stage that a run directory belongs to, by its configuration or else its records."""
    stage = read_config_values(run_dir).get("stage")
    if isinstance(stage, dict) and stage.get("name"):
        return str(stage["name"])
    rows = read_rows(run_dir / METRICS)
    return str(read_json(run_dir / SUMMARY).get("stage") or (rows[0].get("stage") if rows else run_dir.name))


def read_config_values(run_dir: Path) -> dict[str, Any]:
    """The resolved configuration as plain values; an empty one if there is none to read."""
    try:
        values = yaml.safe_load((run_dir / CONFIG).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def collect_stage(directory: Path, name: str) -> StageReport:
    """Gather one stage; a stage that never ran is "missing" and otherwise empty."""
    summary = read_json(directory / SUMMARY)
    problem, traceback = _first_error(directory)
    seconds = float(summary.get("seconds") or 0.0)
    data = summary.get("data") or {}
    return StageReport(
        name=name,
        title=TITLES.get(name, name.upper()),
        directory=directory,
        status=_status(directory, finished=bool(summary), failed=bool(problem)),
        problem=problem,
        traceback=traceback,
        started=str(summary.get("started") or "").replace("T", " ").replace("+00:00", " UTC"),
        time=format_seconds(seconds) if summary else "",
        seconds=seconds,
        phases=_phases(summary.get("phases") or {}, seconds),
        comparisons=_comparisons(summary.get("before") or {}, summary.get("after") or {}),
        questions=_questions(directory, name),
        facts=[*_facts(summary), *_reused(directory)],
        counts=yaml.safe_dump(data["counts"], sort_keys=False, allow_unicode=True) if data.get("counts") else "",
        model=directory / "model" if (directory / "model" / "config.json").exists() else None,
    )


def read_command(directory: Path) -> str:
    """The launcher's command of a run directory, or an empty text."""
    path = directory / COMMAND
    return path.read_text(encoding="utf-8", errors="replace").strip() if path.exists() else ""


def settings(values: Mapping[str, Any]) -> list[Setting]:
    """All options of the stage, and the other options where they differ from the defaults.

    `values` is the resolved configuration. The defaults of a stage live beside its code, which a report doesn't need.
    """
    defaults = dict(_flat(to_plain(Config())))
    own_reward_model = values.get("reward_model") != values.get("model")
    found = []
    for name, value in _flat(values):
        group = name.split(".")[0]
        if group == "reward_model" and not own_reward_model:
            continue
        if group == "stage":
            found.append(Setting(name=name, value=_text(value), default=""))
        elif name not in defaults or value != defaults[name]:
            default = _text(defaults[name]) if name in defaults else ""
            found.append(Setting(name=name, value=_text(value), default=default))
    return found


def _status(directory: Path, *, finished: bool, failed: bool) -> str:
    if failed:
        return "failed"
    if finished:
        return "finished"
    return "unfinished" if directory.exists() else "missing"


def _first_error(directory: Path) -> tuple[str, str]:
    for path in sorted((directory / "errors").glob("rank*.json")):
        error = read_json(path)
        if error:
            kind = "" if error.get("user_error") else f"{error.get('type', 'error')}: "
            return f"{path.stem}: {kind}{error.get('message', '')}", str(error.get("traceback") or "")
    return "", ""


def _phases(phases: Mapping[str, float], seconds: float) -> list[Phase]:
    rest = seconds - sum(phases.values())
    parts = [*sorted(phases.items(), key=lambda entry: -entry[1]), ("start and the rest", max(rest, 0.0))]
    whole = max(seconds, sum(phases.values()), 1e-9)
    return [Phase(name=name, time=format_seconds(value), share=value / whole) for name, value in parts if seconds]


def _comparisons(before: Mapping[str, float | None], after: Mapping[str, float | None]) -> list[Comparison]:
    found = []
    for name in [*before, *(name for name in after if name not in before)]:
        old, new = before.get(name), after.get(name)
        change = format_change(name, old, new)
        spread = before.get("eval/score_std")
        if name == "eval/score" and old is not None and new is not None and spread:
            change += f" ({(new - old) / spread:+.1f} \N{GREEK SMALL LETTER SIGMA})".replace("-", "\N{MINUS SIGN}")
        found.append(
            Comparison(
                label=full_label(name),
                before=format_value(name, old),
                after=format_value(name, new),
                change=change,
                verdict=verdict(name, old, new),
            )
        )
    return sorted(found, key=lambda entry: entry.verdict == "")


def _questions(directory: Path, stage: str) -> list[Question]:
    """The rows of the last step that has samples. A model that a row lacks is taken from an older row of the prompt."""
    rows = [
        row
        for row in read_rows(directory / SAMPLES)
        if row.get("stage") == stage and isinstance(row.get("responses"), dict)
    ]
    newest = max((row.get("step") or 0 for row in rows), default=0)
    older: dict[str, dict[str, Any]] = {}
    for row in rows:
        if (row.get("step") or 0) < newest:
            older.setdefault(str(row.get("prompt", "")), {}).update(row["responses"])
    questions = []
    for row in [row for row in rows if (row.get("step") or 0) == newest][:_SAMPLE_COUNT]:
        prompt = str(row.get("prompt", ""))
        answers = {**older.get(prompt, {}), **row["responses"]}
        questions.append(Question(prompt=prompt, answers=[_answer(model, answer) for model, answer in answers.items()]))
    return questions


def _answer(model: str, answer: Mapping[str, Any]) -> Answer:
    score = answer.get("score")
    return Answer(
        model=model,
        text=str(answer.get("text", "")),
        score="" if score is None else f"{score:.2f}".replace("-", "\N{MINUS SIGN}"),
        tokens=answer.get("tokens"),
        ended=bool(answer.get("ended", True)),
    )


def _facts(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    data = summary.get("data") or {}
    if data.get("fingerprint"):
        yield "data fingerprint", str(data["fingerprint"])
    if summary.get("git_commit"):
        yield "git commit", str(summary["git_commit"])
    for name, value in summary.items():
        if name not in _KNOWN_FACTS and isinstance(value, str | int | float):
            yield label(name).text, _text(value)
    versions = summary.get("versions") or {}
    if versions:
        yield "versions", ", ".join(f"{package} {version}" for package, version in versions.items())


def _reused(directory: Path) -> Iterator[tuple[str, str]]:
    trained_by = read_json(directory / "reused.json").get("from")
    if trained_by:
        yield "reused, trained by", str(trained_by)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _text(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
