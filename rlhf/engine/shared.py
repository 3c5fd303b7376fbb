"""Memory that the ranks of one machine share."""

import mmap
import os
import secrets
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf.engine.distributed import rank

NODES = Path("/sys/devices/system/node")
OVERCOMMIT, NEVER = Path("/proc/sys/vm/overcommit_memory"), "2"


def shared_memory(count: int) -> Tensor | None:
    """New bytes that all ranks read and write, all zero; they are given back with each rank's last tensor of them.

    None on every rank where there are none: on several machines, in several containers, or without Linux. Neither are
    there any where a machine's processors have memory of their own (NUMA), which are faster with copies of their own,
    nor where Linux promises no more memory than it has: it would end a process that takes what is not there, without an
    error. Every rank must call.
    """
    offer = [_offered(count) if rank() == 0 else None]
    dist.broadcast_object_list(offer, src=0)
    if offer[0] is None:
        return None
    memory = _mapped(*offer[0], count)
    everywhere = torch.tensor(int(memory is not None))
    dist.all_reduce(everywhere, op=dist.ReduceOp.MIN)
    if rank() == 0:
        os.close(offer[0][1])
    return torch.frombuffer(memory, dtype=torch.uint8) if memory is not None and everywhere else None


def _offered(count: int) -> tuple[int, int, str] | None:
    """This process, a file of that many bytes in memory, which it has opened, and the file's name."""
    name = secrets.token_hex(16)  # By it another process knows the file for the same.
    try:
        if not hasattr(os, "memfd_create") or len(list(NODES.glob("node[0-9]*"))) > 1:
            return None
        if OVERCOMMIT.read_text(encoding="ascii").strip() == NEVER:
            return None
        file = os.memfd_create(name)  # Not in /dev/shm, which containers limit to 64 MiB as a rule.
    except OSError:
        return None
    try:
        os.ftruncate(file, count)
    except OSError:
        os.close(file)
        return None
    return os.getpid(), file, name


def _mapped(process: int, file: int, name: str, count: int) -> mmap.mmap | None:
    """Another process's file, in this process's memory; None if this process cannot open it."""
    path = f"/proc/{process}/fd/{file}"
    try:
        if os.readlink(path).removesuffix(" (deleted)") != f"/memfd:{name}":
            return None
        own = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        return mmap.mmap(own, count)
    except OSError:
        return None
    finally:
        os.close(own)
