"""Process groups, collectives and seeds: what several ranks share."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from rlhf.engine.loopback import on_one_machine, stay_on_loopback

_timeouts: dict[str, timedelta] = {}  # Of this process's collectives, for groups that are made later.


def initialize_distributed(*, timeout_minutes: float) -> torch.device:
    """Join the process group that the launcher describes in the environment and return this rank's device.

    DeepSpeed's shared-memory all-reduce is switched off first: it would be compiled at start-up, leaks 66 MiB of
    /dev/shm per rank, and is only used by tensor-parallel inference. So is cuDNN's attention, which torch prefers on
    Hopper from 2.11 on: its gradients become NaN at some lengths of padded batches (pytorch/pytorch#196678), and it
    takes half a second to plan for each new shape. Where all ranks are on this machine nothing is heard outside it.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        accelerator.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        torch.backends.cuda.enable_cudnn_sdp(False)
    timeout = timedelta(minutes=timeout_minutes)
    init_method = stay_on_loopback() if on_one_machine() else None
    deepspeed.init_distributed(timeout=timeout, verbose=False, init_method=init_method)
    _timeouts["collective"] = timeout
    return torch.device(accelerator.current_device_name())


def join(*, timeout_minutes: float) -> None:
    """Join the process group unless this process has done so: what a script of a user's own need not think of."""
    if not dist.is_initialized():
        initialize_distributed(timeout_minutes=timeout_minutes)


def shut_down() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's global rank."""
    return dist.get_rank()


def world_size() -> int:
    """The number of ranks."""
    return dist.get_world_size()


def local_world_size() -> int:
    """Number of ranks on this machine, as the launcher says; all of them without a launcher."""
    return int(os.environ.get("LOCAL_SIZE", world_size()))


def barrier() -> None:
    """Wait for all ranks."""
    dist.barrier()


class RankGroup:
    """Consecutive ranks that work on the same thing; every rank is in one group. Every rank must build it.

    Args:
        size: ranks in a group.

    Attributes:
        rank: this process's place in its group.
        size: ranks in a group.
        members: the global ranks of this process's group.

    Raises:
        ValueError: the ranks cannot be divided into groups of that size.
    """

    def __init__(self, size: int) -> None:
        if world_size() % size:
            raise ValueError(f"{world_size()} ranks cannot be divided into groups of {size}")
        self.size, self.rank = size, rank() % size
        self._first = rank() - self.rank
        self.members = list(range(self._first, self._first + size))
        starts, timeout = range(0, world_size(), size), _timeouts.get("collective")
        groups = [dist.new_group(list(range(start, start + size)), timeout=timeout) for start in starts]
        self._group = groups[rank() // size]

    def add_up(self, values: Tensor) -> None:
        """Replace a tensor by its element-wise sum over the group."""
        dist.all_reduce(values, op=dist.ReduceOp.SUM, group=self._group)

    def take_first(self, values: Tensor) -> None:
        """Replace a tensor by that of the group's first rank."""
        dist.broadcast(values, src=self._first, group=self._group)

    def gather_objects(self, value: Any) -> list[Any]:
        """Each rank's value, in the order of the group's ranks."""
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value, group=self._group)
        return gathered


def all_reduce_sum(values: Tensor) -> Tensor:
    """The element-wise sum of a tensor over all ranks; the argument is left alone."""
    total = values.clone()
    dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return total


def all_reduce_max(values: Tensor) -> Tensor:
    """The element-wise maximum of a tensor over all ranks; the argument is left alone."""
    largest = values.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def all_gather_flat(values: Tensor) -> Tensor:
    """The flattened tensors of all ranks, which must be of one size, one behind the other."""
    gathered = torch.empty(world_size() * values.numel(), dtype=values.dtype, device=values.device)
    dist.all_gather_into_tensor(gathered, values.contiguous().view(-1))
    return gathered


def gather_objects(value: Any) -> list[Any]:
    """Each rank's value, in the order of the ranks, on every rank."""
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Whatever draws or seeds within this context, the random numbers after it are those that would have come."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch on this rank.

    Called anew after models are built: under ZeRO-3 only rank 0 draws their initial values, so the generators of the
    ranks differ by then.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
