"""The switch of one engine between training and generation."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import deepspeed
from torch import nn


@contextmanager
def generation_mode(engine: Any, *, gather: bool = True) -> Iterator[nn.Module]:
    """Yield the engine's module ready to generate, and put everything back afterwards, also after an exception.

    Within it dropout and gradient checkpointing are off. Under ZeRO-3 all parameters are gathered once and
    DeepSpeed's per-layer hooks are taken off, or else every layer would be gathered and released for every token;
    so ranks need not take the same number of decoding steps. Without `gather`, for a model that does not fit whole, the
    hooks stay, and all ranks must take part in every step. Every rank must enter and leave.
    """
    module: nn.Module = engine.module
    was_training = module.training
    checkpointing = [part for part in module.modules() if getattr(part, "gradient_checkpointing", False)]
    for part in checkpointing:
        part.gradient_checkpointing = False  # type: ignore[assignment]
    module.eval()
    try:
        with _whole_parameters(engine) if gather else nullcontext():
            yield module
    finally:
        module.train(was_training)
        for part in checkpointing:
            part.gradient_checkpointing = True  # type: ignore[assignment]


def is_partitioned(engine: Any) -> bool:
    """Whether the engine's parameters are divided among the ranks (ZeRO-3)."""
    return bool(engine.zero_optimization_partition_weights())


@contextmanager
def whole_parameters(engine: Any, module: nn.Module) -> Iterator[None]:
    """Within this context the parameters of a part of the engine's module are whole, to be read. Every rank must enter.

    Under ZeRO-0 to 2 they always are.
    """
    if not is_partitioned(engine):
        yield
        return
    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        yield


@contextmanager
def _whole_parameters(engine: Any) -> Iterator[None]:
    optimizer = engine.optimizer
    offload = getattr(optimizer, "parameter_offload", None)
    if offload is None and hasattr(optimizer, "_register_deepspeed_module"):
        offload = optimizer  # An engine without an optimizer holds the partitioner in its place.
    if offload is None:
        yield
        return
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        for hook in offload.forward_hooks + offload.backward_hooks:
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        try:
            yield
        finally:
            offload._register_deepspeed_module(offload.module)
