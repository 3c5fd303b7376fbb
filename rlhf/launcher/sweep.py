"""The jobs of a sweep and what came of them: one JSON file a job, and at the end one table, as text and as CSV."""

import csv
import hashlib
import json
import os
import shlex
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlhf.config.terminal import shown
from rlhf.config.writing import whole_file, write_text

SWEEP = "RLHF_SWEEP"  # The environment variable that names a sweep's directory to its jobs.
JOBS, TABLE, PLOT = "jobs", "summary.csv", "summary.png"


@dataclass(frozen=True, kw_only=True, slots=True)
class JobResult:
    """What came of one job: its overrides by key, exit code, figures by name, and the message of a failure."""

    number: int
    overrides: dict[str, str]
    code: int
    run_dir: str
    message: str = ""
    metric: str = ""
    objective: float | None = None
    figures: dict[str, Any] = field(default_factory=dict)


def sweep_directory(arguments: Sequence[str], *, name: str | None) -> Path:
    """Where a sweep is written: the same for the same command line, so that it goes on there."""
    digest = hashlib.blake2b(os.fsencode(shlex.join(arguments)), digest_size=4).hexdigest()
    return Path("runs", "sweeps", f"{name or 'sweep'}-{digest}").absolute()


def write_result(directory: Path, result: JobResult) -> None:
    """Write a job's file."""
    write_text(directory / JOBS / f"{result.number}.json", json.dumps(asdict(result), indent=1, default=str))


def read_results(directory: Path) -> list[JobResult]:
    """The jobs' files, in order."""
    paths = sorted((directory / JOBS).glob("*.json"), key=lambda path: int(path.stem))
    return [JobResult(**json.loads(path.read_text(encoding="utf-8"))) for path in paths]


def clear_results(directory: Path) -> None:
    """Forget the jobs of an earlier run of the same sweep; their runs are kept."""
    for path in (directory / JOBS).glob("*.json"):
        path.unlink()


def result_rows(results: Sequence[JobResult]) -> list[dict[str, str]]:
    """One row a job: its overrides, as they may be shown, then what came of it; every row has all columns."""
    rows = []
    for result in results:
        state = "done" if result.code == 0 else "failed"
        row = {key: shown(value) for key, value in result.overrides.items()}
        row |= {name: _cell(value) for name, value in result.figures.items()}
        if result.metric:
            row[result.metric] = _cell(result.objective)
        rows.append({**row, "state": state, "run": result.run_dir})
    names = list(dict.fromkeys(name for row in rows for name in row if name not in ("state", "run")))
    return [{name: row.get(name, "") for name in [*names, "state", "run"]} for row in rows]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def swept_keys(results: Sequence[JobResult]) -> list[str]:
    """The overrides that tell the jobs apart; all of them if there is one job."""
    keys = list(dict.fromkeys(key for result in results for key in result.overrides))
    if len(results) < 2:
        return keys
    return [key for key in keys if len({result.overrides.get(key) for result in results}) > 1]


def table_text(rows: Sequence[dict[str, str]], *, hidden: Collection[str] = ()) -> str:
    """The rows under their names, in columns, without the `hidden` ones."""
    if not rows:
        return "no job was run"
    columns = [name for name in rows[0] if name not in hidden and (name != "run" or any(row["run"] for row in rows))]
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in columns}
    lines = ["  ".join(f"{name:<{widths[name]}}" for name in columns)]
    lines += ["  ".join(f"{row[name]:<{widths[name]}}" for name in columns) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def write_table(directory: Path, rows: Sequence[dict[str, str]]) -> Path:
    """Write the rows as CSV."""
    path = directory / TABLE
    with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else ["state"])
        writer.writeheader()
        writer.writerows(rows)
    return path
