"""One picture of a sweep: a bar for each job. Needs matplotlib, which is imported only when drawing."""

from collections.abc import Sequence
from pathlib import Path

_LONGEST_LABEL = 64
_BAR, _GREY = "#0072B2", "#6b7280"


def plot_sweep(labels: Sequence[str], values: Sequence[float | None], *, title: str, path: Path) -> Path | None:
    """Draw a value for each job, in the order of the jobs; None if no job has one. Jobs without a value say so."""
    if not any(value is not None for value in values):
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 0.9 + 0.36 * len(labels)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    positions = range(len(labels))
    axes.barh(positions, [value or 0.0 for value in values], color=_BAR, height=0.62)
    for position, value in zip(positions, values, strict=True):
        text = " no result" if value is None else f" {value:.4g}"
        axes.text(max(value or 0.0, 0.0), position, text, va="center", color=_GREY, fontsize=8)
    axes.set_yticks(positions, [_short(label) for label in labels], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_title(title, loc="left", fontsize=10)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.savefig(path)
    return path


def _short(label: str) -> str:
    """The label, cut in its middle if it would leave no room for the bars."""
    half = _LONGEST_LABEL // 2
    return label if len(label) <= _LONGEST_LABEL else f"{label[:half]}…{label[-half:]}"
