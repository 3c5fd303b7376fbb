"""Tests whose bodies run on every rank of the real DeepSpeed launcher, on CPU ranks with one thread each.

`@pytest.mark.ranks(2)` makes a test such a one: its function is called on both ranks with the values of its fixtures,
and it passes if it returns on both. Ranks are started once for all tests of a session that want as many.
"""

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection, Listener, wait
from pathlib import Path
from typing import Any

import psutil

from rlhf.launcher.command import NO_HOSTFILE

ROOT = Path(__file__).resolve().parents[1]
STARTED_WITHIN = 240.0  # Seconds, on a loaded machine: importing takes ten.
ANSWERED_WITHIN = 240.0
# A rank that failed leaves the others in a collective for ever: they may finish what they are at.
OTHERS_WITHIN = 5.0


class RanksError(Exception):
    """A test's body failed on a rank, or a rank ended or did not answer; the message says what each rank said."""


def launcher(ranks: int) -> list[str]:
    """The command that starts a script on so many ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks), "--no_local_rank"]
    return [*runner, *NO_HOSTFILE, "--master_port", str(port)]


def environment() -> dict[str, str]:
    """What ranks inherit."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    found = os.environ | {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PATH": path,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    return found | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}


def kill(job: "subprocess.Popen[Any]") -> None:
    """End a process and all that it started."""
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(job.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.kill()
    job.kill()
    job.wait()


def run_ranks(script: Path, *arguments: str, ranks: int, timeout: float) -> None:
    """Run a script of its own to its end; fail with what it printed last if it does."""
    command = [*launcher(ranks), str(script), *arguments]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as job:
        try:
            printed, _ = job.communicate(timeout=timeout)
        except BaseException:  # A test's own limit of time, too: ranks that wait for each other would never end.
            kill(job)
            raise
    assert job.returncode == 0, printed[-6000:]


class Ranks:
    """Running ranks, which call one function after another, all of them the same."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._job: subprocess.Popen[bytes] | None = None
        self._connections: list[Connection] = []
        self._printed = tempfile.NamedTemporaryFile(prefix="ranks-", suffix=".txt")  # noqa: SIM115 - as long as we

    def call(self, function: Callable[..., None], arguments: Mapping[str, Any]) -> None:
        """Call a module's function on all ranks and wait for them; raises RanksError."""
        if self._job is None:
            self._start()
        try:
            for connection in self._connections:
                connection.send((sys.modules[function.__module__].__file__, function.__name__, dict(arguments)))
            answers = self._answers()
        except BaseException:
            self.stop()
            raise
        if any(answer != "" for answer in answers.values()):
            printed = Path(self._printed.name).read_text(encoding="utf-8", errors="replace")[-3000:]
            self.stop()  # Who knows what is left of a collective.
            said = "\n".join(f"rank {rank}: {answer or 'passed'}" for rank, answer in sorted(answers.items()))
            raise RanksError(f"{said}\n--- printed last by the ranks:\n{printed}")

    def _start(self) -> None:
        key = secrets.token_bytes(16)
        with Listener(family="AF_UNIX", authkey=key, backlog=self.count) as listener:
            self._printed.truncate(0)
            self._job = subprocess.Popen(
                [*launcher(self.count), str(ROOT / "tests" / "rank.py"), str(listener.address)],
                env=environment() | {"RANKS_KEY": key.hex()},
                stdin=subprocess.DEVNULL,
                stdout=self._printed,
                stderr=subprocess.STDOUT,
            )
            waiting: Any = listener
            waiting._listener._socket.settimeout(1.0)
            try:
                self._connections = self._accepted(listener)
            except BaseException:
                self.stop()
                raise

    def _accepted(self, listener: Listener) -> list[Connection]:
        end = time.monotonic() + STARTED_WITHIN
        found: dict[int, Connection] = {}
        while len(found) < self.count:
            assert self._job is not None
            if self._job.poll() is not None or time.monotonic() > end:
                printed = Path(self._printed.name).read_text(encoding="utf-8", errors="replace")
                raise RanksError(f"{self.count} ranks did not start:\n{printed[-6000:]}")
            with suppress(TimeoutError):
                connection = listener.accept()
                found[connection.recv()] = connection
        return [found[rank] for rank in sorted(found)]

    def _answers(self) -> dict[int, str]:
        """What each rank says of a call: nothing if it passed."""
        answers: dict[int, str] = {}
        waiting = {connection: rank for rank, connection in enumerate(self._connections)}
        end = time.monotonic() + ANSWERED_WITHIN
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, end - time.monotonic()))
            if not ready:
                answers |= {rank: "has not answered" for rank in waiting.values()}
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    answers[rank] = connection.recv()
                except (EOFError, ConnectionResetError):
                    answers[rank] = "the process ended"
                if answers[rank]:
                    end = min(end, time.monotonic() + OTHERS_WITHIN)
        return answers

    def stop(self) -> None:
        """End the ranks; the next call starts others."""
        for connection in self._connections:
            with suppress(OSError):
                connection.send(None)
                connection.close()
        self._connections = []
        if self._job is not None:
            with suppress(subprocess.TimeoutExpired):
                self._job.wait(timeout=OTHERS_WITHIN)
            kill(self._job)
            self._job = None
