"""Weights & Biases: really offline, and never the end of a run."""

from pathlib import Path

import pytest

from rlhf.config.schema import Precision, TrackingConfig
from rlhf.tracking.records import Sample, read_rows
from rlhf.tracking.trackers import WandbTracker, start_trackers

SAMPLE: Sample = {
    "prompt": "it's a",
    "responses": {
        "sft": {"text": "bore", "tokens": 2, "ended": True},
        "ppo": {"text": "joyful ride", "score": 1.5, "tokens": 3, "ended": True},
    },
}


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No key and no settings of whoever runs the tests."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb-cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb-data"))


def progress(run_dir: Path) -> list[str]:
    return [row["text"] for row in read_rows(run_dir / "progress.jsonl")]


@pytest.mark.processes
def test_offline_writes_a_run_with_metrics_and_samples(tmp_path: Path) -> None:
    run_dir = tmp_path / "pipeline" / "ppo"
    tracking = TrackingConfig(wandb=True, project="film-reviews", offline=True)
    (tracker,) = start_trackers(
        tracking, run_dir=run_dir, stage="ppo", config={"seed": 12321, "format": Precision.bf16}, is_main=True
    )
    tracker.metrics(1, {"train/loss": 0.5})
    tracker.samples(1, [SAMPLE])
    tracker.finish()
    tracker.metrics(2, {"train/loss": 0.5})  # after the end: silently nothing
    assert progress(run_dir) == []
    (written,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    content = written.read_bytes()
    assert b"train/loss" in content and b"film-reviews" in content and b"12321" in content
    (table,) = run_dir.glob("wandb/offline-run-*/files/media/table/*.json")
    assert "joyful ride" in table.read_text()


def test_without_a_key_it_says_so_and_goes_on(tmp_path: Path) -> None:
    tracking = TrackingConfig(wandb=True)
    assert start_trackers(tracking, run_dir=tmp_path, stage="sft", config={}, is_main=True) == []
    (line,) = progress(tmp_path)
    assert "no API key" in line and "tracking.offline=true" in line


def test_nothing_happens_when_it_is_off_or_on_other_ranks(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert start_trackers(TrackingConfig(), run_dir=run_dir, stage="sft", config={}, is_main=True) == []
    assert start_trackers(TrackingConfig(wandb=True), run_dir=run_dir, stage="sft", config={}, is_main=False) == []
    assert not run_dir.exists()


def test_a_failure_is_reported_once_without_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "s3cr3t")

    class BrokenRun:
        def log(self, values: dict[str, object]) -> None:
            raise ConnectionError("refused for s3cr3t")

        def finish(self) -> None:
            raise AssertionError("a broken run is not finished")

    lines: list[str] = []
    tracker = WandbTracker(BrokenRun(), say_line=lines.append)
    tracker.metrics(1, {"train/loss": 1.0})
    tracker.samples(2, [SAMPLE])
    tracker.finish()
    assert lines == ["Weights & Biases failed (ConnectionError: refused for ***): the run goes on without it"]


def test_a_start_that_fails_is_reported(tmp_path: Path) -> None:
    tracking = TrackingConfig(wandb=True, project="bad/project:name", offline=True)
    assert start_trackers(tracking, run_dir=tmp_path, stage="sft", config={}, is_main=True) == []
    (line,) = progress(tmp_path)
    assert line.startswith("Weights & Biases could not start")
