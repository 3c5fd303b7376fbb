"""DeepSpeed's JSON for one role, rendered from typed fields only: DeepSpeed silently accepts misspelt keys."""

from typing import Any

from rlhf.config.roles import Role
from rlhf.config.schema import MemoryConfig, OptimizerConfig, Precision


def deepspeed_config(role: Role, *, memory: MemoryConfig, ranks: int) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a role on so many ranks.

    `memory.precision` must be resolved (not auto). A frozen role has no optimizer; DeepSpeed then allows ZeRO stages 0
    and 3 only, so frozen roles are partitioned exactly when the trained ones have their parameters partitioned.
    The learning-rate schedule is not part of it: the engine gives DeepSpeed a torch scheduler, which DeepSpeed steps
    only when the optimizer stepped.
    """
    assert memory.precision is not Precision.auto, "precision is resolved before rendering"
    accumulation_steps = role.accumulation_steps(ranks)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": role.micro_batch_size_per_gpu,
        "gradient_accumulation_steps": accumulation_steps,
        "train_batch_size": role.micro_batch_size_per_gpu * accumulation_steps * ranks,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
        "zero_optimization": _zero(memory, trained=role.optimizer is not None),
        "gradient_clipping": role.optimizer.max_grad_norm if role.optimizer is not None else 0.0,
    }
    if memory.precision is Precision.bf16:
        config["bf16"] = {"enabled": True}
    if memory.precision is Precision.fp16:
        config["fp16"] = {"enabled": True, "initial_scale_power": 16, "loss_scale_window": 100, "min_loss_scale": 1}
    if role.optimizer is not None:
        config["optimizer"] = _adamw(role.optimizer)
    return config


def _zero(memory: MemoryConfig, *, trained: bool) -> dict[str, Any]:
    stage = memory.zero_stage if trained or memory.zero_stage == 3 else 0
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        # Small tensors stay whole on every rank: gathering them costs more than they take.
        zero["stage3_param_persistence_threshold"] = 10_000
    return zero


def _adamw(optimizer: OptimizerConfig) -> dict[str, Any]:
    # torch's own AdamW: DeepSpeed's fused one compiles C++ at the first start.
    return {
        "type": "AdamW",
        "params": {
            "lr": optimizer.learning_rate,
            "betas": list(optimizer.betas),
            "eps": optimizer.eps,
            "weight_decay": optimizer.weight_decay,
            "torch_adam": True,
            "fused": True,
        },
    }
