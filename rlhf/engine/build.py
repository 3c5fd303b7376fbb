"""From a module and a role to a DeepSpeed engine."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from rlhf.config.errors import ConfigError
from rlhf.config.roles import Role
from rlhf.config.schema import MemoryConfig, OptimizerConfig, Precision, Schedule
from rlhf.launcher.ds_config import deepspeed_config
from rlhf.models.lora import is_adapter
from rlhf.planner.memory import FP16_NEEDS_ZERO

DTYPES = {Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16, Precision.fp32: torch.float32}


@contextmanager
def partitioned_loading(role: Role, *, memory: MemoryConfig, ranks: int) -> Iterator[None]:
    """Within this context `from_pretrained` creates ZeRO-3 shards, so that no rank ever holds a whole model.

    Other ZeRO stages load plainly. DeepSpeed's configuration for this is a process-wide weak reference, which is why
    the context keeps it alive and clears it: a plain model built later would be partitioned by mistake.
    """
    config = deepspeed_config(role, memory=memory, ranks=ranks)
    if config["zero_optimization"]["stage"] != 3:
        yield
        return
    keep_alive = HfDeepSpeedConfig(config)
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del keep_alive


def build_engine(
    module: nn.Module,
    role: Role,
    *,
    memory: MemoryConfig,
    ranks: int,
    total_steps: int = 1,
    adapter_rate: float | None = None,
) -> Any:
    """Wrap a module into a DeepSpeed engine.

    Args:
        module: the model, on any device.
        role: frozen roles get no optimizer.
        memory: ZeRO stage and precision (resolved).
        ranks: size of the process group.
        total_steps: optimizer steps of the whole run: the length of the learning-rate schedule.
        adapter_rate: peak learning rate of the adapters; None: that of the role's optimizer.

    Returns:
        The engine, in training mode for trained roles with dropout as the model has it, else in evaluation mode.

    Raises:
        ConfigError: a role is to be trained in fp16 without ZeRO, where DeepSpeed 0.19 divides the gradients by a loss
            scale that it has not applied.
    """
    config = deepspeed_config(role, memory=memory, ranks=ranks)
    if role.optimizer is not None and "fp16" in config and config["zero_optimization"]["stage"] == 0:
        raise ConfigError(f"memory.zero_stage=0: {FP16_NEEDS_ZERO}: use memory.zero_stage=1 or more")
    if role.optimizer is None:
        module.requires_grad_(False)
        module.eval()
        engine, *_ = deepspeed.initialize(model=module, config=config, dist_init_required=False)
        engine.eval()
        return engine
    engine, *_ = deepspeed.initialize(
        model=module,
        model_parameters=parameter_groups(module, weight_decay=role.optimizer.weight_decay, adapter_rate=adapter_rate),
        config=config,
        lr_scheduler=scheduler_factory(role.optimizer, total_steps=total_steps),
        dist_init_required=False,
    )
    scaler: Any = getattr(engine.optimizer, "loss_scaler", None)
    if hasattr(scaler, "raise_error_at_min_scale"):
        # At the floor DeepSpeed would end the process; steps are skipped and counted instead.
        scaler.raise_error_at_min_scale = False
    return engine


def parameter_groups(
    module: nn.Module, *, weight_decay: float, adapter_rate: float | None = None
) -> list[dict[str, Any]]:
    """Matrices with weight decay; biases, norms and other vectors without; adapters, if they have a rate of their own.

    The schedule multiplies each group's own rate. Dimensions are read from `ds_shape` under ZeRO-3, where a parameter
    itself is an empty placeholder.
    """
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    adapters: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            if adapter_rate is not None and is_adapter(name):
                adapters.append(parameter)
            else:
                (decayed if len(shape) >= 2 else exempt).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": exempt, "weight_decay": 0.0},
        {"params": adapters, "weight_decay": weight_decay, "lr": adapter_rate},
    ]
    return [group for group in groups if group["params"]]


def learning_rate_factor(step: int, *, optimizer: OptimizerConfig, total_steps: int) -> float:
    """The learning rate of optimizer step `step` (from 0) as a share of the peak.

    It rises linearly over the first warmup_ratio of the steps and is never 0, so that no step is wasted; then it
    stays, falls linearly, or falls as half a cosine, and reaches final_ratio at the last step.
    """
    warmup_steps = max(1, round(optimizer.warmup_ratio * total_steps))
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
    if optimizer.schedule is Schedule.constant:
        return 1.0
    remaining = 1.0 - progress if optimizer.schedule is Schedule.linear else 0.5 * (1.0 + math.cos(math.pi * progress))
    return optimizer.final_ratio + (1.0 - optimizer.final_ratio) * remaining


def scheduler_factory(optimizer: OptimizerConfig, *, total_steps: int) -> Callable[[Optimizer], LambdaLR]:
    """What DeepSpeed calls with its optimizer to get the schedule; it steps it only when the optimizer stepped."""

    def create(wrapped: Optimizer) -> LambdaLR:
        return LambdaLR(wrapped, lambda step: learning_rate_factor(step, optimizer=optimizer, total_steps=total_steps))

    return create
