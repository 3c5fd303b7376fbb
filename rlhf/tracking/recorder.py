"""What a stage records while it runs: metrics, samples, progress, time per phase, and a summary at the end."""

import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from rlhf.config.storage import storage_problem
from rlhf.tracking.records import METRICS, SAMPLES, SUMMARY, Sample, append_row, finite, finite_only, say, write_json
from rlhf.tracking.trackers import Tracker

_PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "tokenizers", "hydra-core")
_PROGRESS_INTERVAL = 0.25


class Recorder:
    """Writes the records of one stage into its run directory and passes them on to the trackers.

    Only the main rank writes: on the others everything but the timing of phases does nothing, so that a training loop
    calls it without asking for its rank.
    """

    def __init__(
        self, run_dir: Path, *, stage: str, is_main: bool, trackers: Sequence[Tracker] = (), total_steps: int
    ) -> None:
        self.run_dir = run_dir
        self.stage = stage
        self.total_steps = total_steps
        self.phases: dict[str, float] = {}
        self._is_main = is_main
        self._trackers = list(trackers) if is_main else []
        self._started = time.time()
        self._active_phases: list[str] = []
        self._phase_mark = 0.0
        self._warned: set[str] = set()
        self._waiting: list[tuple[str, Mapping[str, Any]]] = []
        self._waiting_told = False
        self._first_progress: tuple[int, float] | None = None
        self._last_progress = 0.0
        if is_main:
            run_dir.mkdir(parents=True, exist_ok=True)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record the metrics of a step. Names carry a group: train/ eval/ time/ rollout/.

        A value that is not finite is recorded as null, with a warning line the first time it happens to a metric.
        """
        if not self._is_main:
            return
        clean = {name: finite(value) for name, value in values.items()}
        for name in sorted(name for name, value in clean.items() if value is None and name not in self._warned):
            self._warned.add(name)
            self.line(f"warning: {self.stage} step {step}: {name} is {values[name]}, recorded as null")
        self._append(METRICS, {"stage": self.stage, "step": step, "time": time.time(), **clean})
        for tracker in self._trackers:
            tracker.metrics(step, {name: value for name, value in clean.items() if value is not None})

    def samples(self, step: int, rows: Sequence[Sample]) -> None:
        """Record prompts and their responses; numbers that are not finite become null, with a warning."""
        if not self._is_main:
            return
        clean: list[Sample] = finite_only(list(rows))
        broken = sum(one != row for one, row in zip(clean, rows, strict=True))
        if broken and SAMPLES not in self._warned:
            self._warned.add(SAMPLES)
            self.line(
                f"warning: {self.stage} step {step}: {broken} of {len(rows)} samples have scores that are not finite, "
                "recorded as null"
            )
        for row in clean:
            self._append(SAMPLES, {"stage": self.stage, "step": step, **row})
        for tracker in self._trackers:
            tracker.samples(step, clean)

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        """Append a row to a file of the run. While that fails training goes on, and the rows wait for the next try."""
        self._waiting.append((name, row))
        try:
            self._write_waiting()
        except OSError as error:
            if self._waiting_told:
                return
            self._waiting_told = True
            reason = storage_problem(error) or str(error)
            self.line(f"warning: {self.stage}: {name} waits: {reason}; training goes on")

    def _write_waiting(self) -> None:
        while self._waiting:
            name, row = self._waiting[0]
            append_row(self.run_dir / name, row)
            self._waiting.pop(0)
        self._waiting_told = False

    def progress(self, step: int, values: Mapping[str, float], *, tokens_per_second: float | None = None) -> None:
        """Show the state of the run in one line: step, the given values, tokens/s and the time left.

        At most four lines a second are written; the one of the last step always is, and stays on the terminal.
        """
        if not self._is_main:
            return
        now = time.monotonic()
        first_step, first_time = self._first_progress = self._first_progress or (step, now)
        last = step >= self.total_steps
        if not last and now - self._last_progress < _PROGRESS_INTERVAL:
            return
        self._last_progress = now
        parts = [f"{self.stage:<3} {step:>{len(str(self.total_steps))}}/{self.total_steps}"]
        parts += [f"{_short_name(name)} {_number(value)}" for name, value in values.items()]
        if tokens_per_second is not None:
            parts.append(f"{tokens_per_second:,.0f} tokens/s")
        if step > first_step and not last:
            remaining = (now - first_time) / (step - first_step) * (self.total_steps - step)
            parts.append(f"{format_seconds(remaining)} left")
        say(self.run_dir, "  ".join(parts), transient=not last)

    def line(self, text: str) -> None:
        """Show a line that stays on the terminal."""
        if self._is_main:
            say(self.run_dir, text)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the wall-clock seconds inside as the phase's; a phase inside another one pauses the outer one.

        The device isn't waited for: its time falls to the phase in which the host next needs a result.
        """
        self._switch_phase()
        self._active_phases.append(name)
        try:
            yield
        finally:
            self._switch_phase()
            self._active_phases.pop()

    def _switch_phase(self) -> None:
        now = time.perf_counter()
        if self._active_phases:
            name = self._active_phases[-1]
            self.phases[name] = self.phases.get(name, 0.0) + now - self._phase_mark
        self._phase_mark = now

    def summary(
        self, before: Mapping[str, float], after: Mapping[str, float], data: Mapping[str, Any], **facts: Any
    ) -> None:
        """Write summary.json: the evaluations before and after, the data's fingerprint and counts, the time taken.

        `facts` are added as they are (ranks, device, precision, …); versions and the git commit come of themselves.
        Raises OSError if that, or what waits to be written, cannot be written now.
        """
        if not self._is_main:
            return
        self._write_waiting()
        summary = {
            "stage": self.stage,
            "started": datetime.fromtimestamp(self._started, UTC).isoformat(timespec="seconds"),
            "seconds": round(time.time() - self._started, 3),
            "phases": {name: round(seconds, 3) for name, seconds in self.phases.items()},
            "before": {name: finite(value) for name, value in before.items()},
            "after": {name: finite(value) for name, value in after.items()},
            "data": dict(data),
            "versions": package_versions(),
            "git_commit": git_commit(),
            **facts,
        }
        write_json(self.run_dir / SUMMARY, summary)

    def close(self) -> None:
        """Let the trackers send what they still hold."""
        for tracker in self._trackers:
            tracker.finish()


def package_versions() -> dict[str, str]:
    """The installed versions of the packages that a run depends on."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def git_commit() -> str | None:
    """The commit of this code, with "+changes" if files differ from it; None outside a git checkout."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False, env=environment)

    try:
        # An installed copy may lie inside somebody else's repository, whose commit says nothing about this code.
        if git("ls-files", "--error-unmatch", here.name).returncode != 0:
            return None
        commit = git("rev-parse", "HEAD").stdout.strip()
        return (commit + "+changes" if git("diff", "--quiet", "HEAD").returncode == 1 else commit) or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def format_seconds(seconds: float) -> str:
    """A duration as people write it: 0.4s, 8s, 3m05s, 2h10m."""
    if seconds < 1:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def _short_name(name: str) -> str:
    return name.split("/")[-1].replace("_", " ")


def _number(value: float) -> str:
    magnitude = abs(value)
    if magnitude >= 1000:
        return f"{value:,.0f}"
    if magnitude >= 100:
        return f"{value:.1f}"
    return f"{value:.3f}" if magnitude >= 0.001 or value == 0 else f"{value:.1e}"
