"""What launch.py does when the stages have ended: the report, what it says last, and the result of a sweep's job."""

import sys
from pathlib import Path
from statistics import median

from rlhf.config.storage import storage_problem
from rlhf.interpreter import talk_command
from rlhf.launcher.pipeline import StageRun
from rlhf.launcher.process import Outcome
from rlhf.tracking.records import METRICS, SUMMARY, read_json, read_rows


def objective(runs: list[StageRun]) -> float | None:
    """The last stage's objective: of its evaluation after training, or the median of a metric of its steps."""
    last = runs[-1]
    name = last.config.stage.objective
    value = (read_json(last.directory / SUMMARY).get("after") or {}).get(name)
    values = [row[name] for row in read_rows(last.directory / METRICS) if isinstance(row.get(name), int | float)]
    if value is None and values:
        value = median(values)
    return float(value) if isinstance(value, int | float) else None


def conclude(runs: list[StageRun], run_dir: Path, outcome: Outcome) -> Outcome:
    """Write the report, also of a run that failed, say where everything is, and return how the whole went."""
    if not run_dir.is_dir():
        return outcome  # Removed while it was written to: there is nothing to report.
    written = report_outcome(run_dir)
    if written.code:
        print(f"launch.py: {written.message}", file=sys.stderr, flush=True)
    if outcome.code:
        return outcome
    model = runs[-1].directory / "model"
    if not model.is_dir():
        return written
    print(f"model:  {model}")
    if runs[-1].name != "rm":
        print(f"talk:   {talk_command(str(run_dir))}")
    return written


def report_outcome(run_dir: Path) -> Outcome:
    """Write the report and say where it is. Whatever keeps it from being written, what was trained is there."""
    from rlhf.tracking.report import write_report

    try:
        _, report = write_report(run_dir)
    except Exception as error:  # Also matplotlib's: a picture is not worth a traceback after days of training.
        why = storage_problem(error) or f"{type(error).__name__}: {error}"
        return Outcome(
            1, f"the report could not be written: {why}; the same command writes it; the stages are in {run_dir}"
        )
    print(f"report: {report}")
    return Outcome(0)
