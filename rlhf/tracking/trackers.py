"""Services that receive a run's metrics and samples beside the run directory."""

import netrc
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from rlhf.config.files import to_plain
from rlhf.config.schema import TrackingConfig
from rlhf.tracking.records import Sample, say

_ANSWER_COLUMNS = ("text", "score", "tokens", "ended")


class Tracker(Protocol):
    """A receiver of metrics and samples. None of its methods raises: tracking never ends a run."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Receive the metrics of a step; all values are finite."""

    def samples(self, step: int, rows: Sequence[Sample]) -> None:
        """Receive prompts and their responses."""

    def finish(self) -> None:
        """Send what is left and let go of everything."""


class WandbTracker:
    """Sends everything to a Weights & Biases run, whose files are kept in RUN/wandb.

    After the first failure it says so on the terminal and stays silent.
    """

    def __init__(self, run: Any, *, say_line: Callable[[str], None]) -> None:
        self._run = run
        self._say = say_line

    @classmethod
    def start(
        cls, *, project: str, offline: bool, run_dir: Path, stage: str, config: Mapping[str, Any]
    ) -> "WandbTracker":
        """Open a run named after the run directory and grouped by pipeline. Raises whatever wandb raises."""
        import wandb

        settings = wandb.Settings(console="off", silent=True, init_timeout=60)
        in_pipeline = run_dir.name == stage
        run = wandb.init(
            project=project,
            name=f"{run_dir.parent.name}-{stage}" if in_pipeline else run_dir.name,
            group=run_dir.parent.name if in_pipeline else None,
            job_type=stage,
            dir=run_dir,
            mode="offline" if offline else "online",
            config=to_plain(dict(config)),
            settings=settings,
        )
        # Their own step counter drops whatever comes late; a plain column doesn't.
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return cls(run, say_line=lambda text: say(run_dir, text))

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values under their own names."""
        self._attempt(lambda: self._run.log({"step": step, **values}))

    def samples(self, step: int, rows: Sequence[Sample]) -> None:
        """Log a table with a row per response."""
        table_rows = [
            [step, row["prompt"], model, *(answer.get(column) for column in _ANSWER_COLUMNS)]
            for row in rows
            for model, answer in row["responses"].items()
        ]

        columns: list[str | int] = ["step", "prompt", "model", *_ANSWER_COLUMNS]

        def log() -> None:
            import wandb

            self._run.log({"step": step, "samples": wandb.Table(columns=columns, data=table_rows)})

        self._attempt(log)

    def finish(self) -> None:
        """Close the run and wait until it is written."""

        def close() -> None:
            import wandb

            self._run.finish()
            # finish() returns before the last records are on disk; the end of wandb's own process is what says so.
            wandb.teardown()

        self._attempt(close)
        self._run = None

    def _attempt(self, action: Callable[[], None]) -> None:
        if self._run is None:
            return
        try:
            action()
        except Exception as error:
            self._run = None
            self._say(f"Weights & Biases failed ({_reason(error)}): the run goes on without it")


def start_trackers(
    tracking: TrackingConfig, *, run_dir: Path, stage: str, config: Mapping[str, Any], is_main: bool
) -> list[Tracker]:
    """The trackers that the configuration asks for, on the main rank only.

    `config` is the resolved configuration by group. Where Weights & Biases cannot be used (no key, no network,
    not installed) a line in the run's progress says so, and the run goes on without it.
    """
    mode = os.environ.get("WANDB_MODE", "")
    if not is_main or not tracking.wandb or mode == "disabled":
        return []
    run_dir.mkdir(parents=True, exist_ok=True)
    offline = tracking.offline or mode == "offline"
    if not offline and not _has_credentials():
        say(
            run_dir,
            "Weights & Biases: no API key found, the run goes on without it (set WANDB_API_KEY, run `wandb login`, "
            "or keep its files on disk with tracking.offline=true)",
        )
        return []
    try:
        return [
            WandbTracker.start(project=tracking.project, offline=offline, run_dir=run_dir, stage=stage, config=config)
        ]
    except Exception as error:
        say(run_dir, f"Weights & Biases could not start ({_reason(error)}): the run goes on without it")
        return []


def _has_credentials() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    key = os.environ.get("WANDB_API_KEY")
    if key:
        text = text.replace(key, "***")
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
