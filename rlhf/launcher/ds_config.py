"""DeepSpeed's JSON for one role, rendered from typed fields only: DeepSpeed silently accepts misspelt keys."""

import json
from typing import Any

from rlhf.config.roles import Role, roles_of
from rlhf.config.schema import Config, MemoryConfig, OptimizerConfig, Precision, RoleMemory
from rlhf.planner.memory import ranks_of


def deepspeed_config(role: Role, *, memory: MemoryConfig, ranks: int) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a role on so many ranks.

    `memory` must be resolved: a precision that is not auto, and a ZeRO stage.
    The learning-rate schedule is not part of it: the engine gives DeepSpeed a torch scheduler, which DeepSpeed steps
    only when the optimizer stepped.
    """
    assert memory.precision is not Precision.auto, "precision is resolved before rendering"
    placed = memory.of_role(role.name, trained=role.optimizer is not None)
    accumulation_steps = role.accumulation_steps(ranks)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": role.micro_batch_size_per_gpu,
        "gradient_accumulation_steps": accumulation_steps,
        "train_batch_size": role.micro_batch_size_per_gpu * accumulation_steps * ranks,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
        "zero_optimization": _zero(placed),
        "gradient_clipping": role.optimizer.max_grad_norm if role.optimizer is not None else 0.0,
    }
    if memory.precision is Precision.bf16:
        config["bf16"] = {"enabled": True}
    if memory.precision is Precision.fp16:
        config["fp16"] = {"enabled": True, "initial_scale_power": 16, "loss_scale_window": 100, "min_loss_scale": 1}
    if role.optimizer is not None:
        config["optimizer"] = _adamw(role.optimizer)
    if placed.offload_optimizer:
        # torch's AdamW steps on the host as well; DeepSpeed's own needs a C++ compiler.
        config["zero_force_ds_cpu_optimizer"] = False
    return config


def _zero(placed: RoleMemory) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": placed.zero_stage}
    if placed.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    if placed.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": False}
    if placed.zero_stage == 3:
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


def role_files(config: Config) -> dict[str, str]:
    """The rendered JSON of each role of a stage, by file name."""
    files = {}
    for role in roles_of(config, config.stage):
        content = deepspeed_config(role, memory=config.memory, ranks=ranks_of(config))
        files[f"{role.name}.json"] = json.dumps(content, indent=2) + "\n"
    return files
