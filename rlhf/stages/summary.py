"""The end of a sweep: its table, CSV and picture. Imports no torch."""

from pathlib import Path

from rlhf.config.storage import storage_problem
from rlhf.launcher.sweep import PLOT, JobResult, read_results, result_rows, swept_keys, table_text, write_table
from rlhf.tracking.sweep_plot import plot_sweep


def summarize_sweep(directory: Path) -> tuple[str, str]:
    """Write summary.csv and summary.png of a sweep's jobs.

    The CSV has every override; the table and the picture have those that differ between the jobs. Returns the table
    with where everything is, and why not all could be written ("" if it could).
    """
    results = read_results(directory)
    rows, keys = result_rows(results), swept_keys(results)
    constant = {key for result in results for key in result.overrides} - set(keys)
    failed = [result for result in results if result.code]
    lines = ["", f"== {len(results)} jobs, {len(failed)} failed", table_text(rows, hidden=constant)]
    lines += [f"failed: {_label(result, keys)}: {result.message}" for result in failed]
    values = [_value(result) for result in results]
    title = next((result.metric for result in results if result.metric), "") or "model states on a device, GiB"
    try:
        lines.append(f"table:  {write_table(directory, rows)}")
        path = plot_sweep([_label(result, keys) for result in results], values, title=title, path=directory / PLOT)
        lines += [f"plot:   {path}"] if path else []
    except Exception as error:  # Also matplotlib's. The runs themselves are there.
        why = storage_problem(error) or f"{type(error).__name__}: {error}"
        return "\n".join(lines), f"the sweep's summary could not be written: {why}; the same command writes it"
    return "\n".join(lines), ""


def _label(result: JobResult, keys: list[str]) -> str:
    return " ".join(f"{key}={result.overrides[key]}" for key in keys if key in result.overrides)


def _value(result: JobResult) -> float | None:
    value = result.objective if result.metric else result.figures.get("states GiB")
    return None if value is None else float(value)
