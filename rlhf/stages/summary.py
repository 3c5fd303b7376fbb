"""The end of a sweep: its table, CSV and picture. Imports no torch."""

from pathlib import Path

from rlhf.launcher.sweep import PLOT, JobResult, read_results, result_rows, table_text, write_table
from rlhf.tracking.sweep_plot import plot_sweep


def summarize_sweep(directory: Path) -> str:
    """Write summary.csv and summary.png of a sweep's jobs, and return the table with where everything is."""
    results = read_results(directory)
    rows = result_rows(results)
    lines = ["", f"== {len(results)} jobs, {sum(result.code != 0 for result in results)} failed", table_text(rows)]
    lines += [f"failed: {_label(result)}: {result.message}" for result in results if result.code]
    lines.append(f"table:  {write_table(directory, rows)}")
    values = [_value(result) for result in results]
    title = next((result.metric for result in results if result.metric), "") or "model states on a device, GiB"
    path = plot_sweep([_label(result) for result in results], values, title=title, path=directory / PLOT)
    return "\n".join([*lines, *([f"plot:   {path}"] if path else [])])


def _label(result: JobResult) -> str:
    return " ".join(f"{key}={value}" for key, value in result.overrides.items())


def _value(result: JobResult) -> float | None:
    value = result.objective if result.metric else result.figures.get("states GiB")
    return None if value is None else float(value)
