"""Sweeps that really train, in miniature: shared stages, failures, and the same command for what is missing."""

import csv
import importlib.util
import json
import subprocess
from pathlib import Path

import pytest
import yaml
from miniature import launch, small_model

pytestmark = pytest.mark.processes

Finished = tuple[Path, list[str], subprocess.CompletedProcess[str]]
Swept = tuple[Path, list[str], subprocess.CompletedProcess[str]]


def table(folder: Path) -> list[dict[str, str]]:
    """The rows of the only sweep's summary."""
    (path,) = (folder / "runs" / "sweeps").glob("*/summary.csv")
    return list(csv.DictReader(path.open()))


def kl_coef(run_dir: Path) -> float:
    """What a finished pipeline's PPO ran with."""
    return float(yaml.safe_load((run_dir / "ppo" / "config.yaml").read_text())["stage"]["kl_coef"])


@pytest.fixture(scope="module")
def swept(finished: Finished) -> Swept:
    """Three jobs beside a finished pipeline: one is new in PPO alone, one is the same, one cannot run."""
    run_dir, arguments, _ = finished
    folder = run_dir.parents[1]
    swept_arguments = ["-m", *arguments, f"stage.ppo.kl_coef=0.02,{kl_coef(run_dir)},-1"]
    return folder, swept_arguments, launch(*swept_arguments, folder=folder)


def test_a_stage_with_the_same_inputs_is_trained_once(finished: Finished, swept: Swept) -> None:
    run_dir, _, first = finished
    _, _, done = swept
    lines = done.stdout.splitlines()
    for stage in ("sft", "rm"):
        assert sum(line.startswith(f"{stage}: 2 ranks") for line in first.stdout.splitlines()) == 1
        assert sum(line.startswith(f"{stage}: 2 ranks") for line in lines) == 0, done.stdout
        assert (
            sum(line.startswith(f"{stage}: reused, trained with the same inputs by {run_dir}") for line in lines) == 2
        )
    assert sum(line.startswith("ppo: 2 ranks") for line in lines) == 1
    assert sum(line.startswith(f"ppo: reused, trained with the same inputs by {run_dir}") for line in lines) == 1


def test_the_summary_tells_what_came_of_each_job(finished: Finished, swept: Swept) -> None:
    folder, _, done = swept
    assert done.returncode == 2  # One job could not run.
    rows = table(folder)
    assert [(row["stage.ppo.kl_coef"], row["state"]) for row in rows] == [
        ("0.02", "done"),
        (f"{kl_coef(finished[0])}", "done"),
        ("-1", "failed"),
    ]
    for row in rows[:2]:
        summary = json.loads((Path(row["run"]) / "ppo" / "summary.json").read_text())
        assert float(row["eval/score"]) == pytest.approx(summary["after"]["eval/score"], rel=1e-3)
        assert (Path(row["run"]) / "report.html").is_file()
    assert "failed: stage.ppo.kl_coef=-1: stage.ppo.kl_coef=-1.0: must be at least 0" in done.stdout
    header = next(line for line in done.stdout.splitlines() if line.startswith("stage.ppo.kl_coef "))
    assert "model.scratch" not in header  # What all jobs have in common is in the CSV only.
    assert rows[0]["model.scratch.num_layers"] == "2"
    assert list((folder / "runs" / "sweeps").glob("*/summary.png"))


def test_the_same_command_trains_what_is_missing_only(swept: Swept) -> None:
    folder, arguments, _ = swept
    second = Path(table(folder)[1]["run"])
    (second / "ppo" / "done" / "rank1").unlink()  # As if it had been killed at the end.
    again = launch(*arguments, folder=folder)
    lines = again.stdout.splitlines()
    assert sum(line.startswith("finished before, kept: ") for line in lines) == 1
    assert [line for line in lines if line.startswith(("sft: 2 ranks", "rm: 2 ranks"))] == []
    assert sum(line.startswith("ppo: ") and "reused" in line for line in lines) == 1
    assert [row["state"] for row in table(folder)] == ["done", "done", "failed"]


@pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="needs the extra [sweeps]")
def test_optuna_searches_over_the_same_path(tmp_path: Path) -> None:
    arguments = [
        *("-m", "stage=sft", *small_model(tmp_path), "hardware=cpu"),
        *("stage.batch_size=8", "stage.micro_batch_size_per_gpu=2", "stage.max_steps=2"),
        *("hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1"),
        *("hydra.sweeper.direction=minimize", "hydra.sweeper.sampler.seed=1"),
        # The second trial cannot run, and the search goes on.
        *("hydra.sweeper.max_failure_rate=1.0", "stage.optimizer.learning_rate=choice(0.001,-1)"),
        "hydra/sweeper/sampler=grid",
    ]
    done = launch(*[argument for argument in arguments if "seed" not in argument], folder=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    rows = {row["stage.optimizer.learning_rate"]: row for row in table(tmp_path)}
    assert {value: row["state"] for value, row in rows.items()} == {"0.001": "done", "-1": "failed"}
    assert 0 < float(rows["0.001"]["eval/loss"]) < 10
