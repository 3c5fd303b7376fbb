"""The switch of one engine between training and generation."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakSet

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn

from rlhf.engine.distributed import barrier, rank, world_size
from rlhf.engine.shared import shared_memory

TOGETHER = 2**23  # Bytes that are gathered in one collective; more is slower on CPUs.
AHEAD = 3  # Collectives that are under way at once; what they gather exists twice for a moment.
SHARED = 2**20  # Bytes from which ranks share memory: what is less is gathered as fast.
ALIGNMENT = 64  # Bytes: of a cache line, and a multiple of every number's.
_WHOLE: WeakSet[Any] = WeakSet()  # Engines whose parameters are whole at this moment.


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

    Under ZeRO-0 to 2 they always are. Under ZeRO-3 they are put together, as a rule in new memory, which afterwards is
    only forgotten: who detaches a parameter within this context has its values until the optimizer's next step. On CPUs
    the ranks share that memory if all are on one machine, so that nobody may write into it. The engine must not be
    called within.

    Raises:
        RuntimeError: this is within another such context, or `generation_mode`, of the same partitioned engine.
    """
    if not is_partitioned(engine):
        yield
        return
    with _alone(engine):
        parameters: list[Any] = list(module.parameters())
        _settle(engine, parameters)
        on_cpu = torch.device(engine.device).type == "cpu"
        with _shared(parameters) if on_cpu and world_size() > 1 else _gathered(parameters):
            yield


def count_together(engine: Any, module: nn.Module) -> int:
    """How many modules as large as this one are gathered at once, by collectives that are under way together."""
    if not is_partitioned(engine):
        return 1
    parameters: list[Any] = list(module.parameters())
    size: int = sum(parameter.ds_numel * parameter.element_size() for parameter in parameters)
    return max(1, AHEAD * TOGETHER // max(1, size))


@contextmanager
def _alone(engine: Any) -> Iterator[None]:
    """What is made whole in one context, another one would let go."""
    if engine in _WHOLE:
        raise RuntimeError("contexts in which parameters of the same engine are whole cannot be nested")
    _WHOLE.add(engine)
    try:
        yield
    finally:
        _WHOLE.remove(engine)


def _settle(engine: Any, parameters: list[Any]) -> None:
    """End what DeepSpeed has begun, and will not end by itself.

    After some steps of training it gathers parameters for a backward pass at the end of each forward pass, also of one
    without gradients. In a module whose forward pass has raised an exception, it gathers each parameter that is read.
    """
    for part in engine.module.modules():
        own: Any = part._parameters
        if getattr(own, "_in_forward", False):
            own._in_forward = False
    if any(parameter.ds_status is ZeroParamStatus.INFLIGHT for parameter in parameters):
        _partitioner(engine).empty_partition_cache()


@contextmanager
def _gathered(parameters: list[Any]) -> Iterator[None]:
    """DeepSpeed's context gathers one parameter after the other, which takes long where they are many and small."""
    missing = [parameter for parameter in parameters if parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE]
    under_way: deque[Any] = deque()
    for together in _groups(missing):
        under_way.append(together[0].all_gather_coalesced(together))
        if len(under_way) == AHEAD:
            under_way.popleft().wait()
    while under_way:
        under_way.popleft().wait()
    with deepspeed.zero.GatheredParameters(parameters):
        yield


@contextmanager
def _shared(parameters: list[Any]) -> Iterator[None]:
    """Each rank writes its shards into memory that all share, where they can, instead of sending them to the others.

    DeepSpeed takes no notice: for it the parameters stay partitioned.
    """
    missing = [parameter for parameter in parameters if parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE]
    sizes = [_size_with_padding(parameter) for parameter in missing]
    memory = shared_memory(sum(sizes)) if sum(sizes) >= SHARED else None
    if memory is None:
        with _gathered(parameters):
            yield
        return
    try:
        for parameter, place in zip(missing, torch.split(memory, sizes), strict=True):
            each = parameter.ds_tensor.numel()
            shards = place.view(parameter.dtype)[: world_size() * each]
            shards.view(world_size(), each)[rank()].copy_(parameter.ds_tensor)
            parameter.data = shards[: parameter.ds_numel].view(parameter.ds_shape)
        barrier()
        yield
    finally:
        for parameter in missing:
            parameter.data = torch.empty(0, dtype=parameter.dtype)


def _size_with_padding(parameter: Any) -> int:
    """Bytes of a parameter's shards, one behind the other, up to where the next parameter may begin."""
    size = world_size() * parameter.ds_tensor.numel() * parameter.element_size()
    return int(size + -size % ALIGNMENT)


def _groups(parameters: list[Any]) -> Iterator[list[Any]]:
    """Parameters that are gathered together: up to TOGETHER bytes, or one that is larger."""
    group: list[Any] = []
    room = TOGETHER
    for parameter in parameters:
        size = parameter.ds_numel * parameter.element_size()
        if group and size > room:
            yield group
            group, room = [], TOGETHER
        group.append(parameter)
        room -= size
    if group:
        yield group


@contextmanager
def _whole_parameters(engine: Any) -> Iterator[None]:
    offload = _partitioner(engine)
    if offload is None:
        yield
        return
    parameters = list(engine.module.parameters())
    with _alone(engine):
        _settle(engine, parameters)
        with _gathered(parameters):
            for hook in offload.forward_hooks + offload.backward_hooks:
                hook.remove()
            offload.forward_hooks, offload.backward_hooks = [], []
            try:
                yield
            finally:
                offload._register_deepspeed_module(offload.module)


def _partitioner(engine: Any) -> Any:
    """What divides the parameters among the ranks and has them gathered, layer by layer; None under ZeRO-0 to 2."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "_register_deepspeed_module"):
        return optimizer  # An engine without an optimizer holds it in the optimizer's place.
    return getattr(optimizer, "parameter_offload", None)
