"""Ranks and learning rates of adapters, and dropout, in real training: one rank, in this process."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param
from hydra import compose, initialize_config_dir
from miniature import ROOT, small_model
from one_rank import one_rank
from peft import PeftConfig
from safetensors.torch import load_file
from torch import Tensor

from rlhf import DeepSpeedPPOTrainer, DeepSpeedRLHFEngine, prompt_batch
from rlhf.batch import SFTBatch
from rlhf.config.roles import Role
from rlhf.config.schema import Config, MemoryConfig, OptimizerConfig, Precision, Schedule
from rlhf.engine.build import build_engine, partitioned_loading
from rlhf.engine.export import export_model
from rlhf.engine.update import Objective, optimizer_step
from rlhf.launcher.hardware import Machine, resolve
from rlhf.models.load import ScalarModel, load_causal_lm
from rlhf.models.lora import add_adapters
from rlhf.models.tokenizer import load_tokenizer
from rlhf.rollout.forward import next_token_loss
from rlhf.stages import from_composed, register_schemas
from rlhf.stages.preflight import prepare
from rlhf.stages.rm.train import run as train_rm
from rlhf.stages.sft.train import run as train_sft

pytestmark = pytest.mark.processes

MACHINE = Machine(cores=1, gpus=(), cpu_bf16=False, host_memory_gib=8.0)
FAST = ("hardware.gpus_per_node=1", "memory.precision=fp32", "rollout=hf")


def configured(*overrides: str) -> Config:
    """A resolved configuration of one rank on a CPU."""
    register_schemas()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return resolve(from_composed(compose("config", overrides=[*FAST, *overrides])), MACHINE)


def records(run_dir: Path) -> list[dict[str, Any]]:
    """What a run measured."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An SFT model trained with and without dropout, and a reward model trained through adapters of its own rank."""
    path = tmp_path_factory.mktemp("stages")
    small = small_model(path)
    with one_rank(path):
        steps = ("stage.batch_size=8", "stage.micro_batch_size_per_gpu=4", "stage.max_steps=2")
        for name, option in (("plain", "stage.dropout=null"), ("dropped", "stage.dropout=0.5")):
            config = configured("stage=sft", *steps, *small, option)
            prepare(config)
            train_sft(config, path / name)
        start = f"stage.sft_model={path / 'plain' / 'model'}"
        train_rm(configured("stage=rm", *steps, *small, "lora.rm_rank=3", "stage.dropout=0.1", start), path / "rm")
        yield path


def ranks(model: Any) -> set[int]:
    """The ranks of a model's adapters."""
    return {value.shape[0] for name, value in model.named_parameters() if ".lora_A." in name}


def test_dropout_changes_training_alone(folder: Path) -> None:
    plain, dropped = (records(folder / name) for name in ("plain", "dropped"))
    assert plain[0]["eval/loss"] == dropped[0]["eval/loss"]
    assert plain[1]["train/loss"] != pytest.approx(dropped[1]["train/loss"], rel=1e-6)
    assert plain[1]["train/grad_norm"] != pytest.approx(dropped[1]["train/grad_norm"], rel=1e-3)
    exported = [json.loads((folder / name / "model" / "config.json").read_text()) for name in ("plain", "dropped")]
    assert exported[0] == exported[1]  # What is trained from it, as a reward model, has the model's own dropout.


def test_a_reward_model_has_adapters_of_its_own_rank(folder: Path) -> None:
    assert PeftConfig.from_pretrained(str(folder / "rm" / "adapter")).r == 3
    adapters = load_file(folder / "rm" / "adapter" / "adapter_model.safetensors")
    ups = [value for name, value in adapters.items() if "lora_B" in name]
    assert {value.shape[1] for value in ups} == {3}
    assert all(value.abs().max() > 0 for value in ups)


@pytest.mark.parametrize("critic_rank", [0, 2])
def test_the_critic_has_a_rank_of_its_own(folder: Path, tmp_path: Path, critic_rank: int) -> None:
    sizes = ("stage.rollout_batch_size=4", "stage.mini_batch_size=4", "stage.micro_batch_size_per_gpu=4")
    config = configured(
        *("stage=ppo", *sizes, *small_model(tmp_path), "data.max_response_length=6"),
        *("lora.rank=4", f"lora.critic_rank={critic_rank}"),
    )
    tokenizer = load_tokenizer(folder / "plain" / "model")
    engine = DeepSpeedRLHFEngine(
        actor_model_name_or_path=str(folder / "plain" / "model"),
        critic_model_name_or_path=str(folder / "rm" / "model"),
        tokenizer=tokenizer,
        num_total_iters=1,
        args=config,
    )
    assert ranks(engine.actor.module) == {4}
    assert ranks(engine.critic.module) == ({critic_rank} if critic_rank else set())
    trained = [name for name, value in engine.critic.module.named_parameters() if value.requires_grad]
    assert any(name.endswith("embed_tokens.weight") for name in trained) == (critic_rank == 0)
    assert "classifier.score.weight" in trained
    before = {name: value.detach().clone() for name, value in engine.critic.module.named_parameters()}
    trainer = DeepSpeedPPOTrainer(engine=engine, args=config)
    trainer.train_rlhf(trainer.generate_experience(prompt_batch(tokenizer, ["a film", "the plot", "a scene", "it"])))
    moved = [name for name, value in engine.critic.module.named_parameters() if not torch.equal(value, before[name])]
    assert moved and set(moved) <= set(trained)
    out = tmp_path / "critic" / "model"
    export_model(engine.critic, engine.critic_model.classifier, tokenizer, out, prefix=ScalarModel.prefix)
    if critic_rank:
        assert PeftConfig.from_pretrained(str(out.parent / "adapter")).r == critic_rank


def whole_weights(engine: Any) -> dict[str, Tensor]:
    """The fp32 weights that the optimizer moves, whatever the ZeRO stage."""
    found = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            whole = safe_get_full_fp32_param(parameter)
            found[name] = (parameter if whole is None else whole).detach().clone()
    return found


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_adapters_move_at_their_own_rate(folder: Path, zero_stage: int) -> None:
    """Adam's first step is its rate, whatever the gradient; the schedule begins at half of the peak."""
    directory = folder / "plain" / "model"
    tokenizer = load_tokenizer(directory)
    memory = MemoryConfig(zero_stage=zero_stage, precision=Precision.fp32)
    optimizer = OptimizerConfig(learning_rate=1e-3, eps=1e-12, schedule=Schedule.constant, warmup_ratio=0.0)
    role = Role(name="model", optimizer=optimizer, batch_size=2, micro_batch_size_per_gpu=2)
    with partitioned_loading(role, memory=memory, ranks=1):
        model = load_causal_lm(directory, tokenizer, dtype=torch.float32, attention="sdpa")
    add_adapters(model, rank=2, alpha=4.0, dropout=0.0, targets=["q_proj", "fc1"], seed=0, only_lora=False)
    engine = build_engine(model, role, memory=memory, ranks=1, adapter_rate=0.02)
    before = whole_weights(engine)
    ids = torch.arange(10, 26).view(2, 8)
    whole = torch.ones_like(ids, dtype=torch.bool)
    batch = SFTBatch(sequence_ids=ids, attention_mask=whole, loss_mask=whole)
    step = Objective(
        micro_batches=[batch],
        loss_sum=lambda part: next_token_loss(engine, part, vocab_limit=len(tokenizer)),
        num_targets=14.0,
    )
    optimizer_step(engine, step)
    moved = {name: float((value - before[name]).abs().max()) for name, value in whole_weights(engine).items()}
    adapters = {name: value for name, value in moved.items() if name.endswith("lora_B.default.weight")}
    others = {name: value for name, value in moved.items() if "lora_" not in name}
    assert adapters and others
    assert list(adapters.values()) == pytest.approx([0.01] * len(adapters), rel=1e-3)
    assert list(others.values()) == pytest.approx([5e-4] * len(others), rel=1e-3)
