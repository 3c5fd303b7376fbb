"""Plots of a run: small multiples drawn from metrics.jsonl. Needs matplotlib, which is imported only when drawing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.tracking.labels import format_number, label
from rlhf.tracking.records import METRICS, STAGES, read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

_WIDTH = 10.0  # inches; at 150 dots per inch sharp at the report's width
_PANEL_HEIGHT = 2.55
# Blue and vermilion of Okabe and Ito's palette are told apart with every kind of colour vision.
_TRAINING, _HELD_OUT, _GREY = "#0072B2", "#D55E00", "#6b7280"


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One small plot: what training measures as a line, what evaluations measure as joined points."""

    title: str
    training: str | None = None
    held_out: str | None = None
    unit: str = ""
    log: bool = False
    chance: float | None = None

    @property
    def names(self) -> list[str]:
        """The metrics drawn in it."""
        return [name for name in (self.training, self.held_out) if name]


_PANELS: dict[str, list[Panel]] = {
    "sft": [
        Panel(title="Loss", training="train/loss", held_out="eval/loss", unit="nats per token"),
        Panel(title="Held-out perplexity", held_out="eval/perplexity", unit="log scale", log=True),
    ],
    "rm": [
        Panel(title="Accuracy", training="train/accuracy", held_out="eval/accuracy", unit="% of pairs", chance=0.5),
        Panel(title="Loss", training="train/loss", held_out="eval/loss", unit="nats per pair"),
        Panel(
            title="Margin", training="train/margin", held_out="eval/margin", unit="chosen \N{MINUS SIGN} rejected score"
        ),
    ],
    "ppo": [
        Panel(title="Score", training="rollout/score", held_out="eval/score", unit="mean per response"),
        Panel(
            title="KL to the reference",
            training="rollout/kl_per_sequence",
            held_out="eval/kl_per_sequence",
            unit="nats per response",
        ),
        Panel(
            title="Response length",
            training="rollout/response_length",
            held_out="eval/response_length",
            unit="tokens, mean",
        ),
        Panel(title="Ended by EOS", training="rollout/eos_rate", held_out="eval/eos_rate", unit="% of responses"),
        Panel(title="Policy loss", training="actor/loss", unit="per token"),
        Panel(title="Value loss", training="critic/loss", unit="per token"),
        Panel(title="Clipped by the policy loss", training="actor/clip_fraction", unit="% of tokens"),
        Panel(title="Entropy", training="actor/entropy", unit="nats per token"),
        Panel(title="Positive, says the judge", held_out="eval/judge_positive", unit="% of responses"),
    ],
}
_OVERVIEW: dict[str, Panel] = {
    "sft": Panel(title="SFT: held-out perplexity", held_out="eval/perplexity", unit="log scale", log=True),
    "rm": Panel(
        title="Reward model: accuracy",
        training="train/accuracy",
        held_out="eval/accuracy",
        unit="% of pairs",
        chance=0.5,
    ),
    "ppo": Panel(title="PPO: score", training="rollout/score", held_out="eval/score", unit="mean per response"),
}


def plot_stage(run_dir: Path, stage: str) -> Path | None:
    """Draw RUN/plots/<stage>.png from the stage's metrics; None if there is nothing to draw.

    A stage without panels of its own gets one for each of its training and evaluation metrics.
    """
    rows = [row for row in read_rows(run_dir / METRICS) if row.get("stage") == stage]
    samples = any("rollout/score" in row for row in rows)
    panels = _PANELS.get(stage) or (_PANELS["ppo"] if samples else _panels_of(rows))
    chosen = [panel for panel in panels if any(_series(rows, name)[0] for name in panel.names)]
    return _draw([(panel, stage, rows) for panel in chosen], run_dir / "plots" / f"{stage}.png")


def plot_pipeline(run_dir: Path) -> Path | None:
    """Draw RUN/plots/pipeline.png, the main curve of every stage there is, from the merged metrics."""
    rows = read_rows(run_dir / METRICS)
    of_stage = {stage: [row for row in rows if row.get("stage") == stage] for stage in STAGES}
    chosen = [
        (_OVERVIEW[stage], stage, stage_rows)
        for stage, stage_rows in of_stage.items()
        if any(_series(stage_rows, name)[0] for name in _OVERVIEW[stage].names)
    ]
    return _draw(chosen, run_dir / "plots" / "pipeline.png")


def _panels_of(rows: Sequence[Row]) -> list[Panel]:
    names = {name for row in rows for name in row if name.split("/")[0] in ("train", "eval") and "/" in name}
    bare = sorted({name.split("/")[1] for name in names})
    return [
        Panel(
            title=label(name).text.capitalize(),
            training=f"train/{name}" if f"train/{name}" in names else None,
            held_out=f"eval/{name}" if f"eval/{name}" in names else None,
            unit=label(name).unit,
        )
        for name in bare
    ]


def _series(rows: Sequence[Row], name: str) -> tuple[list[float], list[float]]:
    points = {row["step"]: float(row[name]) for row in rows if row.get(name) is not None and "step" in row}
    steps = sorted(points)
    return [float(step) for step in steps], [points[step] for step in steps]


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average over about a twentieth of the run, without the bias of its start."""
    decay = 1 - 1 / max(1.0, len(values) / 20)
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        smoothed.append(total / weight)
    return smoothed


def _draw(panels: Sequence[tuple[Panel, str, Sequence[Row]]], path: Path) -> Path | None:
    if not panels:
        return None
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = len(panels) if len(panels) <= 3 else (2 if len(panels) == 4 else 3)
    lines = -(-len(panels) // columns)
    with matplotlib.rc_context({"font.size": 9.0, "font.family": "DejaVu Sans", "axes.unicode_minus": True}):
        figure = Figure(
            figsize=(_WIDTH, _PANEL_HEIGHT * lines + 0.3),
            dpi=150,
            layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1),
        )
        for index, (panel, stage, rows) in enumerate(panels):
            _draw_panel(figure.add_subplot(lines, columns, index + 1), panel, stage, rows)
        _legend(figure, [panel for panel, _, _ in panels])
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, facecolor="white")
    return path


def _draw_panel(axes: "Axes", panel: Panel, stage: str, rows: Sequence[Row]) -> None:
    scale = 100.0 if label(panel.names[0]).percent else 1.0
    if panel.chance is not None:
        axes.axhline(panel.chance * scale, color=_GREY, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.annotate(
            "chance",
            (1.0, panel.chance * scale),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 3),
            textcoords="offset points",
            ha="right",
            color=_GREY,
            fontsize=7.5,
        )
    if panel.training:
        steps, values = _series(rows, panel.training)
        values = [scale * value for value in values]
        axes.plot(steps, values, color=_TRAINING, alpha=0.25, linewidth=0.8)
        axes.plot(steps, _smooth(values), color=_TRAINING, linewidth=1.6)
    if panel.held_out:
        steps, values = _series(rows, panel.held_out)
        values = [scale * value for value in values]
        axes.plot(steps, values, color=_HELD_OUT, linewidth=1.2, marker="o", markersize=4.2, zorder=3, clip_on=False)
        _mark_ends(axes, panel.held_out, steps, values)
    _decorate(axes, panel, stage)


def _mark_ends(axes: "Axes", name: str, steps: Sequence[float], values: Sequence[float]) -> None:
    """Write the first and the last evaluation beside their points: they are what the report's table compares."""
    from matplotlib.patheffects import withStroke

    rises = values[-1] > values[0]
    for index, alignment in ((0, "left"), (-1, "right"))[: len(values)]:
        value = values[index]
        number = f"{value:.0f} %" if label(name).percent else format_number(value)
        below = rises and index == 0
        axes.annotate(
            number,
            (steps[index], value),
            xytext=(0, -7 if below else 7),
            textcoords="offset points",
            ha=alignment,
            va="top" if below else "bottom",
            color=_HELD_OUT,
            fontsize=8,
            fontweight="bold",
            zorder=4,
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )


def _decorate(axes: "Axes", panel: Panel, stage: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes.set_title(panel.title, loc="left", fontsize=9.5, fontweight="bold", pad=14)
    axes.text(0, 1.025, panel.unit, transform=axes.transAxes, fontsize=7.8, color=_GREY)
    axes.set_xlabel("iteration" if stage == "ppo" else "optimizer step", fontsize=8, color=_GREY)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.margins(x=0.03, y=0.2)
    if panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=9))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, labelsize=8, labelcolor="#374151")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#9ca3af")


def _legend(figure: "Figure", panels: Sequence[Panel]) -> None:
    from matplotlib.lines import Line2D

    handles = []
    if any(panel.training for panel in panels):
        handles.append(
            Line2D([], [], color=_TRAINING, linewidth=1.6, label="training (smoothed; every step behind it)")
        )
    if any(panel.held_out for panel in panels):
        handles.append(Line2D([], [], color=_HELD_OUT, linewidth=1.2, marker="o", markersize=4.2, label="held-out"))
    figure.legend(
        handles=handles, loc="outside lower left", ncols=2, frameon=False, fontsize=8, labelcolor="#374151", borderpad=0
    )
