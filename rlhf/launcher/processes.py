"""The processes of one run: found by a mark in their environment, told apart by rank, and ended without rest."""

import contextlib
import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

RUN_MARK = "RLHF_RUN_MARK"
_TICK = 0.05


@dataclass(frozen=True, slots=True)
class Death:
    """A rank that ended: its number, and the signal or exit code if they could be seen."""

    rank: int
    signal: int | None
    code: int | None


@dataclass(frozen=True, slots=True)
class _Stat:
    state: str
    group: int
    session: int
    started: int
    exit_status: int


def _stat(pid: int) -> _Stat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    cells = text.rpartition(")")[2].split()
    return _Stat(cells[0], int(cells[2]), int(cells[3]), int(cells[19]), int(cells[49]))


def _environment(pid: int) -> dict[str, str]:
    try:
        content = Path(f"/proc/{pid}/environ").read_bytes().decode("utf-8", errors="replace")
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in content.split("\0") if "=" in entry)


class RunProcesses:
    """All processes that descend from one DeepSpeed launcher, also those that it has lost.

    They share the launcher's session; those that left it are still known by the mark that every process of the run
    inherits in its environment.
    """

    def __init__(self, leader: int, mark: str) -> None:
        self._leader = leader
        self._mark = mark
        self._ranks: dict[int, tuple[int, int]] = {}
        self._dead: dict[int, Death] = {}
        self.pids: set[int] = {leader}

    def alive(self) -> list[int]:
        """The pids of all processes of the run that have not ended."""
        found = []
        for entry in os.listdir("/proc"):
            if not entry.isdigit():
                continue
            stat = _stat(int(entry))
            if stat is None or stat.state in "ZX":
                continue
            if self._leader in (stat.group, stat.session) or _environment(int(entry)).get(RUN_MARK) == self._mark:
                found.append(int(entry))
        self.pids.update(found)
        return found

    def find_ranks(self, expected: int) -> None:
        """Learn which process is which rank, until all are known."""
        if len(self._ranks) >= expected:
            return
        for pid in self.alive():
            stat, environment = _stat(pid), _environment(pid)
            if stat is None or environment.get(RUN_MARK) != self._mark or not environment.get("RANK", "").isdigit():
                continue
            rank = int(environment["RANK"])
            # A rank's own children inherit its variables, but started later.
            if rank not in self._ranks or stat.started < self._ranks[rank][1]:
                self._ranks[rank] = (pid, stat.started)

    def deaths(self) -> list[Death]:
        """The ranks that have ended so far, in the order in which that was seen."""
        for rank, (pid, started) in self._ranks.items():
            if rank in self._dead:
                continue
            stat = _stat(pid)
            if stat is None or stat.started != started:
                self._dead[rank] = Death(rank, None, None)
            elif stat.state in "ZX":
                killed_by, code = stat.exit_status & 0x7F, stat.exit_status >> 8
                self._dead[rank] = Death(rank, killed_by or None, None if killed_by else code)
        return list(self._dead.values())

    def send(self, signum: int) -> None:
        """Send a signal to every process of the run."""
        for pid in self.alive():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signum)

    def end(self, grace: float) -> None:
        """End every process that is left: first asked by SIGTERM, after `grace` seconds by SIGKILL.

        A helper that is about to leave by itself gets a second to do so.
        """
        if self._wait(min(1.0, grace)):
            return
        for signum, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, 10.0)):
            if not self._wait(0.0):
                self.send(signum)
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline and not self._wait(0.2):
                if signum == signal.SIGKILL:
                    self.send(signum)

    def _wait(self, seconds: float) -> bool:
        """Whether all have ended, asked again for so many seconds."""
        deadline = time.monotonic() + seconds
        while self.alive():
            if time.monotonic() >= deadline:
                return False
            time.sleep(_TICK)
        return True


def remove_shared_memory(*, port: int, pids: set[int], folder: Path = Path("/dev/shm")) -> None:
    """Delete what the processes of a run left in shared memory: DeepSpeed's by port, torch's by process."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        buffer = re.fullmatch(r"deepspeed_.*_(\d+)_\d+", path.name)
        of_torch = re.match(r"torch_(\d+)_", path.name)
        ours = (buffer and int(buffer[1]) == port) or (of_torch and int(of_torch[1]) in pids)
        if ours:
            with contextlib.suppress(OSError):
                path.unlink()
