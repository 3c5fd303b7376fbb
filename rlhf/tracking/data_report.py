"""The doctor's findings on a data mix: a text for the terminal, a page, and a picture of the lengths."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.config.terminal import shown
from rlhf.tracking.report import template_environment

_LOSS, _PLAIN, _RESET = "\033[30;42m", "\033[2m", "\033[0m"
_COLORS = {"prompt": "#6b7280", "chosen": "#0072B2", "rejected": "#D55E00"}


@dataclass(frozen=True, kw_only=True, slots=True)
class DataReport:
    """What is told of a mix: tables are a header and rows of cells, examples those of the inspector."""

    name: str
    fingerprint: str
    parts: list[list[str]]
    sources: list[list[str]]
    findings: list[str]
    examples: Sequence[Any]
    problems_file: str


def as_text(report: DataReport, *, colored: bool) -> str:
    """The report for a terminal, escaped; without colours what the loss is on stands in «»."""
    lines = [
        f"# Data mix {shown(report.name)} ({report.fingerprint})",
        "",
        *_table(report.sources),
        "",
        *_table(report.parts),
    ]
    lines += ["", *(f"- {shown(finding)}" for finding in report.findings)] if report.findings else []
    mark = f"{_LOSS}on green{_RESET}" if colored else "in «»"
    lines += ["", f"# Examples: what the loss is on stands {mark}"]
    for example in report.examples:
        lines.append(shown(f"\n[{example.part}, {example.source}, {example.where}: {example.title}]"))
        lines.append("".join(_piece(text, is_target, colored) for text, is_target in example.pieces))
    lines.append(f"\nEvery dropped or truncated row: {shown(report.problems_file)}")
    return "\n".join(lines)


def _piece(text: str, is_target: bool, colored: bool) -> str:
    if colored:
        return f"{_LOSS if is_target else _PLAIN}{shown(text)}{_RESET}"
    return f"«{shown(text)}»" if is_target else shown(text)


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(shown(row[column])) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (
            shown(cell).ljust(width) if column < 2 else shown(cell).rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()


def write_page(report: DataReport, picture: Path, page: Path) -> None:
    """Write the report as one HTML file that needs nothing else."""
    template = template_environment(page.parent, escape=True).get_template("data.html.j2")
    page.write_text(template.render(report=report, picture=picture), encoding="utf-8")


def draw_lengths(lengths: Mapping[str, Mapping[str, Any]], limits: Mapping[str, int], path: Path) -> None:
    """Histograms of tokens, one panel for each part; a dashed line where rows are dropped or answers cut."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 2.4 * max(1, len(lengths))), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for number, (part, series) in enumerate(lengths.items(), start=1):
        axes = figure.add_subplot(len(lengths), 1, number)
        longest = max(int(values.max()) for values in series.values())
        bins = np.linspace(0, longest + 1, min(60, longest + 2)).tolist()
        for name, values in series.items():
            axes.hist(values, bins=bins, histtype="stepfilled", alpha=0.35, color=_COLORS[name], label=name)
            axes.hist(values, bins=bins, histtype="step", color=_COLORS[name])
        for name, limit in limits.items():
            if limit <= 1.1 * longest:
                axes.axvline(limit, color=_COLORS[name], linestyle="--", linewidth=1)
        axes.set_title(f"{part}: {max(len(values) for values in series.values())} rows", loc="left", fontsize=10)
        axes.set_xlabel("tokens" if number == len(lengths) else "")
        axes.set_ylabel("rows")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)
