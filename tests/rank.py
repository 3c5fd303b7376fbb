"""A rank that calls tests' functions as `ranks.py` says, until it is told to end. Usage: rank.py ADDRESS"""

import gc
import importlib
import os
import sys
import traceback
from multiprocessing.connection import Client
from pathlib import Path

import torch

from rlhf.engine.distributed import initialize_distributed, rank, shut_down


def reported(error: BaseException) -> str:
    """The error as Python prints it, with the values of the test's variables."""
    found = traceback.TracebackException.from_exception(error, capture_locals=True)
    own = [frame for frame in found.stack if Path(frame.filename).name.startswith("test_")]
    for frame in found.stack:
        values = frame.locals if frame in own[-1:] else None
        frame.locals = values and {name: " ".join(value.split())[:100] for name, value in values.items()}
    return "".join(found.format())


def call(file: str, function: str, arguments: dict[str, object]) -> str:
    """Call a test's function; what it raises, or nothing."""
    folder = str(Path(file).parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        wanted = getattr(importlib.import_module(Path(file).stem), function)
        gc.freeze()  # The libraries' million objects need no look at each collection, of which tests make many.
        wanted(**arguments)
    except BaseException as error:
        return reported(error)
    finally:
        gc.collect()  # Engines refer to themselves.
    return ""


def main() -> None:
    """Connect, then call what is sent."""
    torch.set_num_threads(1)
    initialize_distributed(timeout_minutes=3)
    with Client(sys.argv[1], family="AF_UNIX", authkey=bytes.fromhex(os.environ.pop("RANKS_KEY"))) as tests:
        tests.send(rank())
        while (job := tests.recv()) is not None:
            tests.send(call(*job))
    shut_down()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    # As the real worker does: a library's thread that is left may abort a process in its exit handlers.
    os._exit(0)
