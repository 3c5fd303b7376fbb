"""A process group of one rank in the test's own process: real engines without starting a process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import deepspeed.comm.comm as comm
import torch.distributed as dist
from deepspeed.utils import groups

from rlhf.engine.distributed import initialize_distributed, shut_down


@contextmanager
def one_rank(folder: Path) -> Iterator[None]:
    """Within this context the process is rank 0 of 1; afterwards it is in no group, and DeepSpeed has forgotten it."""
    os.environ["LOCAL_RANK"] = "0"
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 1), rank=0, world_size=1)
    try:
        initialize_distributed(timeout_minutes=3)
        yield
    finally:
        shut_down()
        del os.environ["LOCAL_RANK"]
        comm.cdb = None
        groups._WORLD_GROUP = None
