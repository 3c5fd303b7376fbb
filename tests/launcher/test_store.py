"""Trained stages that are kept for other runs: found, taken, damaged, and asked for by two runs at once."""

import io
import json
import threading
from pathlib import Path

from rlhf.config.schema import Config
from rlhf.launcher.store import StageStore, tree_digests


def trained(directory: Path, *, weights: bytes = b"weights") -> Path:
    """The directory of a stage that has finished."""
    for name, content in {"model/model.safetensors": weights, "done/rank0": b"", "plots/loss.png": b"png"}.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (directory / "config.yaml").write_text("seed: 1")
    return directory


def store(folder: Path, stream: io.StringIO | None = None) -> StageStore:
    def key_of(config: Config) -> str:
        return f"sft-{config.seed}"

    return StageStore(folder / ".stages", key_of=key_of, stream=stream or io.StringIO())


def test_a_kept_stage_is_taken_with_its_files_and_names_who_trained_it(tmp_path: Path) -> None:
    first, stages = trained(tmp_path / "a" / "sft"), store(tmp_path)
    assert stages.find("sft-1") is None
    stages.keep("sft-1", first)
    entry = stages.find("sft-1")
    assert entry is not None
    second = tmp_path / "b" / "sft"
    assert stages.take(entry, second) == str(first)
    assert (second / "model" / "model.safetensors").read_bytes() == b"weights"
    assert (second / "done" / "rank0").is_file()
    assert not (second / "plots").exists()  # They are drawn anew.
    assert json.loads((second / "reused.json").read_text()) == {"key": "sft-1", "from": str(first)}
    assert tree_digests(second) == tree_digests(first)


def test_a_private_stage_is_handed_on_as_readable_as_everything_else(tmp_path: Path) -> None:
    first, stages = trained(tmp_path / "a" / "sft"), store(tmp_path)
    for path in first.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    stages.keep("sft-1", first)
    entry = stages.find("sft-1")
    assert entry is not None
    stages.take(entry, tmp_path / "b")
    usual = tmp_path / "usual"
    usual.touch()
    for path in (tmp_path / "b").rglob("*"):
        assert path.is_dir() or path.stat().st_mode == usual.stat().st_mode, path
    assert (tmp_path / "b" / "model" / "model.safetensors").read_bytes() == b"weights"


def test_it_outlives_the_run_that_trained_it_and_takes_no_room_before(tmp_path: Path) -> None:
    first, stages = trained(tmp_path / "a" / "sft"), store(tmp_path)
    stages.keep("sft-1", first)
    weights = first / "model" / "model.safetensors"
    assert weights.stat().st_nlink == 2
    weights.unlink()
    entry = stages.find("sft-1")
    assert entry is not None
    stages.take(entry, tmp_path / "b")
    assert (tmp_path / "b" / "model" / "model.safetensors").read_bytes() == b"weights"


def test_plans_and_failed_attempts_are_not_part_of_a_stage(tmp_path: Path) -> None:
    first, stages = trained(tmp_path / "a"), store(tmp_path)
    for name in ("plan/plan.txt", "failed-1/command.txt", ".lock-0", "report.html"):
        (first / name).parent.mkdir(exist_ok=True)
        (first / name).write_text("first")
    stages.keep("sft-1", first)
    for name in ("plan/plan.txt", "failed-1/command.txt", ".lock-0", "report.html"):
        (first / name).write_text("second")  # In place: were it shared, the entry would be damaged.
    entry = stages.find("sft-1")
    assert entry is not None
    stages.take(entry, tmp_path / "b")
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"model", "done", "config.yaml", "reused.json"}


def test_a_damaged_stage_is_noticed_and_forgotten(tmp_path: Path) -> None:
    for damage in ("change", "remove", "add", "manifest"):
        said = io.StringIO()
        stages = store(tmp_path / damage, said)
        stages.keep("sft-1", trained(tmp_path / damage / "a"))
        entry = tmp_path / damage / ".stages" / "sft-1"
        weights = entry / "model" / "model.safetensors"
        if damage == "change":
            weights.write_bytes(b"weightz")  # The same length.
        elif damage == "remove":
            weights.unlink()
        elif damage == "add":
            (entry / "model" / "other.safetensors").touch()
        else:
            (entry / "manifest.json").write_text("{")
        assert stages.find("sft-1") is None
        assert "is damaged" in said.getvalue() and "trained again" in said.getvalue()
        assert not entry.exists()


def test_two_runs_that_need_the_same_stage_train_it_once(tmp_path: Path) -> None:
    said, trainings = io.StringIO(), []
    started, may_end = threading.Event(), threading.Event()

    def run(name: str) -> None:
        stages = store(tmp_path, said)
        with stages.reserved("sft-1", name=name):
            if stages.find("sft-1") is None:
                started.set()
                may_end.wait(10)
                trainings.append(name)
                stages.keep("sft-1", trained(tmp_path / name))

    threads = [threading.Thread(target=run, args=(name,)) for name in ("a", "b")]
    threads[0].start()
    assert started.wait(10)
    threads[1].start()
    while "waiting for it" not in said.getvalue():
        threads[1].join(0.05)
    may_end.set()
    for thread in threads:
        thread.join(10)
    assert trainings == ["a"]
