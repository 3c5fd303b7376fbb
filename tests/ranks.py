"""A script under the real DeepSpeed launcher, on CPU ranks with one thread each."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil

from rlhf.launcher.command import NO_HOSTFILE

ROOT = Path(__file__).resolve().parents[1]


def run_ranks(script: Path, *arguments: str, ranks: int, timeout: float) -> None:
    """Run it to its end; fail with what it printed last if it does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", *NO_HOSTFILE]
    runner += ["--num_accelerators", str(ranks), "--no_local_rank"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    command = [*runner, "--master_port", str(port), str(script), *arguments]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as job:
        try:
            printed, _ = job.communicate(timeout=timeout)
        except BaseException:  # A test's own limit of time, too: ranks that wait for each other would never end.
            for process in [*psutil.Process(job.pid).children(recursive=True), job]:
                process.kill()
            raise
    assert job.returncode == 0, printed[-6000:]
