"""What the tests here build on each rank: engines of the miniature models, batches, and PPO's parts."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf import DeepSpeedPPOTrainer, DeepSpeedRLHFEngine
from rlhf.batch import Experience, PromptBatch, SFTBatch
from rlhf.config.roles import Role
from rlhf.config.schema import (
    Config,
    DataConfig,
    LoraConfig,
    MemoryConfig,
    Normalize,
    OptimizerConfig,
    Precision,
    RolloutConfig,
    Schedule,
    ScorerConfig,
)
from rlhf.engine.build import DTYPES, build_engine, partitioned_loading
from rlhf.engine.distributed import all_reduce_max, all_reduce_sum, rank, seed_everything, world_size
from rlhf.engine.export import export_model
from rlhf.functional.masking import position_ids
from rlhf.models.load import load_causal_lm
from rlhf.models.tokenizer import load_tokenizer
from rlhf.rollout.forward import next_token_loss, response_logprobs
from rlhf.stages.ppo.config import PPOConfig

# Some gradients are zero but for rounding (keys' biases); with a tiny epsilon Adam would make full steps of that noise.
STEADY = OptimizerConfig(learning_rate=1e-2, eps=1e-5, schedule=Schedule.constant, warmup_ratio=0.0, max_grad_norm=1.0)
ROLE = Role(name="model", optimizer=STEADY, batch_size=8, micro_batch_size_per_gpu=2)
SINGLE = replace(ROLE, micro_batch_size_per_gpu=1)
STAGES = (0, 1, 2, 3)
TOLERANCE = {Precision.fp32: 1e-5, Precision.bf16: 2e-2}


def zero(stage: int, precision: Precision = Precision.fp32) -> MemoryConfig:
    """A ZeRO stage without more."""
    return MemoryConfig(zero_stage=stage, precision=precision)


def fixed_batch(tokenizer: Any) -> SFTBatch:
    """Eight sequences of uneven lengths, the same on every rank."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(6, len(tokenizer), (8, 20), generator=generator)
    lengths = torch.tensor([20, 9, 14, 5, 17, 11, 7, 19])
    attention_mask = torch.arange(20) < lengths.unsqueeze(1)
    loss_mask = attention_mask & (torch.arange(20) >= 3)
    return SFTBatch(
        sequence_ids=torch.where(attention_mask, ids, tokenizer.pad_token_id),
        attention_mask=attention_mask,
        loss_mask=loss_mask,
    )


def share_of(batch: SFTBatch) -> SFTBatch:
    """This rank's rows."""
    size = len(batch) // world_size()
    return batch.rows(slice(rank() * size, (rank() + 1) * size))


def targets_of(batch: SFTBatch) -> float:
    """How many tokens a batch predicts."""
    return float(batch.loss_mask[:, 1:].sum())


def policy_engine(folder: Path, memory: MemoryConfig, role: Role = ROLE, *, steps: int = 10) -> tuple[Any, Any]:
    """The miniature policy and its engine."""
    tokenizer = load_tokenizer(folder / "policy")
    with partitioned_loading(role, memory=memory, ranks=world_size()):
        model = load_causal_lm(folder / "policy", tokenizer, dtype=DTYPES[memory.precision], attention="eager")
    return model, build_engine(model, role, memory=memory, ranks=world_size(), total_steps=steps)


def loss_of(engine: Any, tokenizer: Any) -> Callable[[SFTBatch], Tensor]:
    """The sum of a micro-batch's losses."""
    return lambda part: next_token_loss(engine, part, vocab_limit=len(tokenizer))


def exported(engine: Any, model: Any, tokenizer: Any, directory: Path) -> dict[str, Tensor]:
    """The weights that plain transformers reads from an export; both ranks see the same directory."""
    export_model(engine, model, tokenizer, directory)
    written: dict[str, Tensor] = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).state_dict()
    return written


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Largest absolute difference between two sets of weights."""
    return max(float((value - second[name]).abs().max()) for name, value in first.items())


def ppo_config(*, memory: MemoryConfig, lora: LoraConfig | None = None) -> Config:
    """Options for a rollout of eight prompts and two mini-batches."""
    return Config(
        lora=lora or LoraConfig(),
        stage=PPOConfig(
            rollout_batch_size=8,
            mini_batch_size=4,
            micro_batch_size_per_gpu=2,
            optimizer=STEADY,
            critic_optimizer=STEADY,
        ),
        data=DataConfig(max_response_length=10),
        rollout=RolloutConfig(),
        scorer=ScorerConfig(normalize=Normalize.model),
        memory=memory,
    )


def prompts_for(tokenizer: Any) -> PromptBatch:
    """This rank's prompts: ragged, left-padded."""
    generator = torch.Generator().manual_seed(3 + rank())
    rows = 8 // world_size()
    ids = torch.randint(6, len(tokenizer), (rows, 6), generator=generator)
    mask = torch.arange(6) >= torch.tensor([0, 2, 4, 1]).repeat(2)[:rows].unsqueeze(1)
    return PromptBatch(prompt_ids=torch.where(mask, ids, tokenizer.pad_token_id), prompt_mask=mask)


def ppo_engine(folder: Path, config: Config, **options: Any) -> DeepSpeedRLHFEngine:
    """PPO's models: the miniature policy and reward model, unless the options say otherwise."""
    given = {"critic_model_name_or_path": str(folder / "reward"), "num_total_iters": 4} | options
    return DeepSpeedRLHFEngine(
        actor_model_name_or_path=str(folder / "policy"),
        tokenizer=load_tokenizer(folder / "policy"),
        args=config,
        **given,
    )


def iterated(trainer: DeepSpeedPPOTrainer, prompts: PromptBatch) -> tuple[Experience, dict[str, float]]:
    """One iteration: the experience, and the metrics over all ranks."""
    seed_everything(11 + rank())
    experience = trainer.generate_experience(prompts)
    trainer.train_rlhf(experience)
    return experience, trainer.metrics.flush(all_reduce_sum, all_reduce_max)


def logprobs_of(model: Any, experience: Experience, vocab_limit: int) -> Tensor:
    """What a model or engine says of the responses, [B, R]."""
    with torch.no_grad():
        return response_logprobs(model, experience.rollout, temperature=1.0, vocab_limit=vocab_limit)


def whole_inputs(experience: Experience) -> dict[str, Tensor]:
    """What a scalar model takes."""
    mask = experience.rollout.attention_mask
    return {"input_ids": experience.sequence_ids, "attention_mask": mask, "position_ids": position_ids(mask)}
