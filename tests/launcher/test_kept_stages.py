"""Which stages of a run are kept when the same command is given again, and what is said of it."""

import io
import json
import sys
from pathlib import Path

import pytest

from rlhf.config.errors import DataError
from rlhf.config.schema import Accelerator, Config, HardwareConfig, Reuse
from rlhf.launcher import pipeline
from rlhf.launcher.command import LaunchCommand
from rlhf.launcher.pipeline import StageRun, changed_inputs, run_stages
from rlhf.launcher.store import StageStore
from rlhf.stages.sft.config import SFTConfig

pytestmark = pytest.mark.processes

RANK = """
import pathlib, sys
folder = pathlib.Path(sys.argv[1])
(folder / "model").mkdir()
(folder / "done").mkdir()
(folder / "done" / "rank0").touch()
"""


def small_stage(folder: Path, monkeypatch: pytest.MonkeyPatch, *, reuse: Reuse = Reuse.auto) -> StageRun:
    """A stage in a folder whose only rank leaves what a finished one has."""
    hardware = HardwareConfig(accelerator=Accelerator.cpu, gpus_per_node=1, nodes=1, threads_per_rank=1)
    run = StageRun(config=Config(stage=SFTConfig(), hardware=hardware, reuse=reuse), directory=folder / "sft")
    command = LaunchCommand(argv=(sys.executable, "-S", "-c", RANK, str(run.directory)), variables={}, port=1)
    monkeypatch.setattr(pipeline, "launch_command", lambda *_, **__: command)
    monkeypatch.setattr(pipeline, "role_files", lambda _: {})
    return run


def start(folder: Path, monkeypatch: pytest.MonkeyPatch, *, reuse: Reuse = Reuse.auto, **inputs: str) -> list[str]:
    """Give the same command in a folder while a stage would be made of `inputs`; return the lines that are told."""
    run = small_stage(folder, monkeypatch, reuse=reuse)
    stream = io.StringIO()
    outcome = run_stages([run], gpus=(), stream=stream, inputs_of=lambda _: inputs)
    assert (outcome.code, outcome.message) == (0, "")
    assert json.loads((run.directory / "inputs.json").read_text())
    return [line for line in stream.getvalue().splitlines() if ": 1 ranks on" not in line]


def test_a_finished_stage_is_kept_only_if_it_is_made_of_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "sft"
    assert start(tmp_path, monkeypatch, data="1", weights="1", code="1") == []
    kept = f"sft: finished before with the same data, weights and code, kept: {place}"
    assert start(tmp_path, monkeypatch, data="1", weights="1", code="1") == [kept]
    told = start(tmp_path, monkeypatch, reuse=Reuse.finished, data="2", weights="1", code="2")
    assert told == [f"sft: kept, although its data and code changed since it finished (reuse=finished): {place}"]
    assert start(tmp_path, monkeypatch, data="2", weights="1", code="1") == [
        "sft: trained again: its data changed since it finished (reuse=finished keeps it)",
        f"sft: starts anew; what was there is now {place / 'earlier-1'}",
    ]
    assert (place / "earlier-1" / "model").is_dir() and (place / "model").is_dir()
    assert start(tmp_path, monkeypatch, data="2", weights="1", code="1") == [kept]
    (place / "inputs.json").unlink()
    assert "no record" in start(tmp_path, monkeypatch, data="2", weights="1", code="1")[0]
    assert (place / "earlier-2" / "model").is_dir()
    (place / "done" / "rank0").unlink()
    assert start(tmp_path, monkeypatch, data="2")[0].endswith(str(place / "failed-1"))


def test_a_finished_stage_whose_model_was_removed_is_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "sft"
    assert start(tmp_path, monkeypatch, data="1") == []
    (place / "model").rmdir()
    assert start(tmp_path, monkeypatch, data="1") == [
        "sft: finished before, but its model is gone: trained again",
        f"sft: starts anew; what was there is now {place / 'failed-1'}",
    ]
    assert (place / "model").is_dir()


def test_a_store_that_cannot_be_used_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "store").touch()  # Where somebody else's folder of stages would be.
    run = small_stage(tmp_path, monkeypatch)
    stream = io.StringIO()
    store = StageStore(tmp_path / "store", key_of=lambda _: "sft-1", stream=stream)
    assert run_stages([run], gpus=(), stream=stream, inputs_of=lambda _: {"data": "1"}, store=store).code == 0
    assert "sft: no stage of other runs is used, nor is this one kept: " in stream.getvalue()
    assert (run.directory / "model").is_dir()


def test_inputs_that_change_while_a_stage_is_trained_are_told_and_not_kept_for_other_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = iter("1")

    def inputs_of(_: Config) -> dict[str, str]:
        return {"data": next(content, "2"), "code": "1"}

    run = small_stage(tmp_path, monkeypatch)
    stream = io.StringIO()
    store = StageStore(tmp_path / "store", key_of=lambda _: "sft-1", stream=stream)
    assert run_stages([run], gpus=(), stream=stream, inputs_of=inputs_of, store=store).code == 0
    assert "sft: its data changed while it was trained" in stream.getvalue()
    assert store.find("sft-1") is None
    assert json.loads((run.directory / "inputs.json").read_text()) == {"data": None, "code": "1"}
    # Nor does the stage count as one that is made of either.
    assert changed_inputs(run, lambda _: {"data": "1", "code": "1"}) == ["data"]


def test_data_that_are_gone_when_a_stage_ends_do_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, there = small_stage(tmp_path, monkeypatch), iter("1")

    def inputs_of(_: Config) -> dict[str, str]:
        if (content := next(there, None)) is None:
            raise DataError("data.sources.main: there is no such file")
        return {"data": content}

    stream = io.StringIO()
    assert run_stages([run], gpus=(), stream=stream, inputs_of=inputs_of).code == 0
    assert "sft: its data changed while it was trained" in stream.getvalue()
