"""vLLM in the training process: its answers are those of transformers with the weights of the moment.

Needs vLLM: `make test-vllm` installs its build for CPUs into an environment of its own.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from answering import save_policy
from miniature import launch, miniature, small_model
from ranks import run_ranks

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the policy is."""
    path = tmp_path_factory.mktemp("vllm")
    save_policy(path)
    return path


@pytest.mark.parametrize("each", [1, 2])
def test_answers_are_those_of_transformers_with_the_weights_of_the_moment(folder: Path, each: int) -> None:
    for rank in range(2 if each > 1 else 0):  # What an earlier run leaves.
        Path(f"/dev/shm/-tp:0-[0-1]-cpushm_{rank}").touch()
    run_ranks(Path(__file__).with_name("answering.py"), str(folder), str(each), ranks=2, timeout=600)
    facts: dict[str, Any] = json.loads((folder / f"vllm-{each}.json").read_text())
    assert facts["random_state_kept"] == 1.0
    assert facts["threads"] == 1.0
    for name in ("zero3_lora", "zero0", "zero1", "zero2", "zero3"):
        assert facts[name]["tokens"] > 10
        assert facts[name]["same"] == 1.0
        assert facts[name]["stopped"] == facts[name]["ended"] == 1.0
        assert facts[name]["again"] == 1.0
        assert facts[name]["logprob_error"] < 1e-4


WITH_VLLM = ["hardware=cpu", "memory=zero3", "rollout=vllm", "rollout.importance_cap=2"]
WIDE = ["model.scratch.hidden_size=128"]  # Heads as wide as vLLM's kernels want.


def metrics(stage: Path) -> list[dict[str, Any]]:
    """What a stage wrote down."""
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline whose answers were sampled by vLLM, as a user starts it."""
    run = tmp_path_factory.mktemp("pipeline") / "run"
    done = launch(*miniature(run.parent), *WITH_VLLM, *WIDE, f"run_dir={run}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rollout: vLLM" in done.stdout and "warning: vLLM" not in done.stdout
    return run


def test_a_run_compares_and_weighs_the_probabilities_of_its_tokens(finished: Path) -> None:
    trained = [row for row in metrics(finished / "ppo") if "rollout/importance_weight" in row]
    assert len(trained) == 2
    for row in trained:
        assert 0.9 < row["rollout/importance_weight"] < 1.1
        assert row["rollout/logprob_difference"] < 0.05


def test_what_is_drawn_of_a_part_of_the_distribution_is_not_compared_and_that_is_said(finished: Path) -> None:
    folder = finished.parent
    models = [f"stage.actor_model={finished / 'sft' / 'model'}", f"stage.reward_model={finished / 'rm' / 'model'}"]
    sizes = ["stage.rollout_batch_size=8", "stage.mini_batch_size=4", "stage.micro_batch_size_per_gpu=1"]
    steps = ["stage.iterations=1", "stage.eval_prompts=4", "rollout.top_k=20"]
    options = [*small_model(folder), *WITH_VLLM, *WIDE, *models, *sizes, *steps]
    done = launch("stage=ppo", *options, f"run_dir={folder / 'part'}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning: rollout.importance_cap does nothing" in done.stdout
    assert "warning: vLLM's tokens come without log-probabilities" in done.stdout
    assert not [row for row in metrics(folder / "part") if "rollout/logprob_difference" in row]


def test_a_model_that_it_cannot_run_is_refused_before_training(tmp_path: Path) -> None:
    sizes = ["stage.batch_size=8", "stage.micro_batch_size_per_gpu=2", "stage.max_steps=2"]
    done = launch("stage=sft", *small_model(tmp_path), *WITH_VLLM, *sizes, f"run_dir={tmp_path / 'run'}")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "cannot generate with this model here" in done.stderr and "head_dim=16" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
