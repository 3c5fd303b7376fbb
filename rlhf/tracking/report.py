"""The report of a run: report.md and a self-contained report.html, from the run directory's files alone. No torch."""

import base64
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from rlhf.config.terminal import shown
from rlhf.config.writing import write_text
from rlhf.interpreter import talk_command
from rlhf.tracking.collect import (
    TITLES,
    Setting,
    StageReport,
    collect_stage,
    is_pipeline,
    read_command,
    read_config_values,
    settings,
    stage_name,
)
from rlhf.tracking.plots import plot_pipeline, plot_stage
from rlhf.tracking.recorder import format_seconds
from rlhf.tracking.records import COMMAND, CONFIG, METRICS, SAMPLES, STAGES

_MARKDOWN = re.compile(r"([\\`*_{}\[\]#|~$])")


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What the templates show. Plots are keyed by stage; the overview's key is "pipeline"."""

    name: str
    kind: str
    run_dir: Path
    pipeline: bool
    complete: bool
    stages: list[StageReport]
    absent: list[str]
    plots: dict[str, Path]
    shared_facts: list[tuple[str, str]]
    summary: list[tuple[str, str]]
    settings: list[Setting]
    config: str
    command: str
    talk_to: str
    total_time: str


def write_report(run_dir: Path) -> tuple[Path, Path]:
    """Write report.md and report.html of a stage's or a pipeline's run directory and return their paths.

    A run that is not complete gets a report too, which says what is missing. For a pipeline the stages' records are
    merged first, and every stage that ran gets a report of its own.
    """
    run_dir = Path(run_dir)
    pipeline = is_pipeline(run_dir)
    if pipeline:
        merge_records(run_dir)
        for name in STAGES:
            if (run_dir / name).exists():
                write_report(run_dir / name)
    report = _collect(run_dir, pipeline=pipeline)
    paths = run_dir / "report.md", run_dir / "report.html"
    for path, template, escape in zip(paths, ("report.md.j2", "report.html.j2"), (False, True), strict=True):
        write_text(path, template_environment(run_dir, escape=escape).get_template(template).render(report=report))
    return paths


def merge_records(run_dir: Path) -> None:
    """Write a pipeline's metrics.jsonl, samples.jsonl and command.txt: those of its stages, one after the other.

    What no stage has is left alone.
    """
    for file_name in (METRICS, SAMPLES, COMMAND):
        parts = [run_dir / name / file_name for name in STAGES]
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in parts if path.exists()]
        if texts:
            lines = (text if text.endswith("\n") else f"{text}\n" for text in texts if text)
            write_text(run_dir / file_name, "".join(lines))


def _collect(run_dir: Path, *, pipeline: bool) -> Report:
    own_name = stage_name(run_dir)
    if pipeline:
        stages = [collect_stage(run_dir / name, name) for name in STAGES]
        drawn = {stage.name: run_dir / stage.name / "plots" / f"{stage.name}.png" for stage in stages}
        drawn["pipeline"] = plot_pipeline(run_dir) or run_dir / "plots" / "pipeline.png"
    else:
        stages = [collect_stage(run_dir, own_name)]
        drawn = {own_name: plot_stage(run_dir, own_name) or run_dir / "plots" / f"{own_name}.png"}
    values = read_config_values(run_dir)
    config_path = run_dir / CONFIG
    shared = _shared_facts(stages)
    talkable = [stage for stage in stages if stage.model and stage.name != "rm"]
    return Report(
        name=run_dir.resolve().name if not pipeline and own_name != run_dir.name else _full_name(run_dir),
        kind=TITLES.get(own_name, own_name.upper()),
        run_dir=run_dir,
        pipeline=pipeline,
        complete=all(stage.status == "finished" for stage in stages),
        stages=[stage for stage in stages if stage.status != "missing"],
        absent=[stage.title for stage in stages if stage.status == "missing"],
        plots={name: path for name, path in drawn.items() if path.exists()},
        shared_facts=shared,
        summary=_headline(values),
        settings=settings(values),
        config=config_path.read_text(encoding="utf-8", errors="replace") if config_path.exists() else "",
        command=read_command(run_dir),
        talk_to=talk_command(str(run_dir)) if talkable else "",
        total_time=format_seconds(sum(stage.seconds for stage in stages)),
    )


def _full_name(run_dir: Path) -> str:
    path = run_dir.resolve()
    return f"{path.parent.name}/{path.name}" if path.name in STAGES else path.name


def _shared_facts(stages: list[StageReport]) -> list[tuple[str, str]]:
    """The facts that all stages that ran have in common."""
    lists = [stage.facts for stage in stages if stage.facts]
    return [fact for fact in lists[0] if all(fact in facts for facts in lists)] if lists else []


def _headline(values: dict[str, object]) -> list[tuple[str, str]]:
    """The choices that a run is known by."""
    found = []
    for group in ("model", "data", "hardware"):
        chosen = values.get(group)
        if isinstance(chosen, dict) and chosen.get("name"):
            found.append((group, str(chosen["name"])))
    return [*found, ("seed", str(values["seed"]))] if "seed" in values else found


def template_environment(run_dir: Path, *, escape: bool) -> jinja2.Environment:
    """The templates beside this file; paths are shown relative to `run_dir`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=escape,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown_value,
    )
    environment.filters["image"] = lambda path: base64.b64encode(path.read_bytes()).decode()
    environment.filters["relative"] = lambda path: os.path.relpath(path, run_dir).replace(os.sep, "/")
    environment.filters["cell"] = markdown_cell
    environment.filters["code"] = markdown_code
    return environment


def _shown_value(value: Any) -> Any:
    """Every value that a template shows is escaped; what a macro has rendered is made of such values."""
    return shown(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def markdown_cell(text: str) -> str:
    """The text as one cell of a Markdown table: nothing in it is markup, a link or the end of the cell."""
    text = shown(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = _MARKDOWN.sub(r"\\\1", text).replace("://", "&#58;//").replace("www.", "www&#46;").replace("@", "&#64;")
    return text.strip().replace("\n", "<br>").replace("\t", " ")


def markdown_code(text: str) -> str:
    """The text as a fenced code block that nothing inside it can close."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}\n{shown(text).rstrip()}\n{fence}"
