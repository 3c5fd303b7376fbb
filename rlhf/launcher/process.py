"""Runs the DeepSpeed launcher and tells honestly how it went: the bare launcher leaves orphans and hides failures."""

import json
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rlhf.launcher.command import PROJECT, LaunchCommand
from rlhf.launcher.processes import RUN_MARK, Death, RunProcesses, remove_shared_memory
from rlhf.launcher.watchdog import STOP, watchdog_variables

POLL_SECONDS = 0.15
# Time to write error files and leave, after the first rank failed, after a signal, and after all ranks have finished.
FAILURE_GRACE = 8.0
SIGNAL_GRACE = 8.0
FINISH_GRACE = 30.0
_TAIL_LINES = 20
_CLOCK_SLACK = 2.0  # Clocks of machines that share a file system differ.
_POLITE = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a launch ended: 0 success, 1 failure, 2 the user's to fix, 128 + signal when interrupted; and why."""

    code: int
    message: str = ""


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGHUP in a list instead of dying of them; ignored ones (nohup) stay ignored."""
    received: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        received.append(signum)

    previous: dict[signal.Signals, Any] = {}
    for signum in _POLITE:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            previous[signum] = signal.signal(signum, note)
    try:
        yield received
    finally:
        for restored, handler in previous.items():
            signal.signal(restored, handler)


def is_finished(run_dir: Path, ranks: int) -> bool:
    """Whether every rank wrote its marker, which is the last thing that a rank does."""
    return all((run_dir / "done" / f"rank{rank}").is_file() for rank in range(ranks))


def supervise(command: LaunchCommand, *, run_dir: Path, ranks: int, on_poll: Callable[[], None]) -> Outcome:
    """Start the launcher in its own session, watch it, end all of its processes, and say how it went.

    Success means that every rank wrote its marker, whatever the launcher's exit code is. The first rank that fails
    ends the run. Signals go on to all processes; after a grace time, or at the second signal, they are killed.
    """
    log = run_dir / "logs" / "launcher.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    stop = run_dir / STOP
    stop.unlink(missing_ok=True)
    started = time.time()
    mark = secrets.token_hex(8)
    environment = command.environment(os.environ) | watchdog_variables() | {RUN_MARK: mark}
    with caught_signals() as received, log.open("ab") as output:
        launcher = subprocess.Popen(
            command.argv,
            env=environment,
            cwd=PROJECT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        processes = RunProcesses(launcher.pid, mark)
        try:
            deaths = _watch(launcher, processes, received, run_dir=run_dir, ranks=ranks, on_poll=on_poll, since=started)
            _await_other_machines(command, run_dir, ranks, launcher)
        finally:
            if not is_finished(run_dir, ranks):
                stop.touch()
            processes.end(grace=0.0 if len(received) > 1 else 3.0)
            launcher.wait()
            on_poll()
            remove_shared_memory(port=command.port, pids=processes.pids)
        if received:
            name = signal.Signals(received[0]).name
            return Outcome(128 + received[0], f"interrupted by {name}: all ranks have ended; logs: {run_dir / 'logs'}")
    if is_finished(run_dir, ranks):
        return Outcome(0)
    return _failure(run_dir, deaths, launcher.returncode, since=started)


def _await_other_machines(
    command: LaunchCommand, run_dir: Path, ranks: int, launcher: "subprocess.Popen[bytes]"
) -> None:
    """Give the ranks that other machines started time to write their markers."""
    deadline = time.monotonic() + FINISH_GRACE
    elsewhere = command.local_ranks is not None and len(command.local_ranks) < ranks
    while elsewhere and launcher.poll() == 0 and not is_finished(run_dir, ranks) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def _watch(
    launcher: subprocess.Popen[bytes],
    processes: RunProcesses,
    received: list[int],
    *,
    run_dir: Path,
    ranks: int,
    on_poll: Callable[[], None],
    since: float,
) -> list[Death]:
    """Wait until the launcher ends or has to be ended; return the ranks that died before."""
    deadline = float("inf")
    forwarded = False
    while launcher.poll() is None and time.monotonic() < deadline and len(received) < 2:
        on_poll()
        processes.find_ranks(ranks)
        now = time.monotonic()
        if received and not forwarded:
            forwarded = True
            processes.send(received[0])
            deadline = min(deadline, now + SIGNAL_GRACE)
        if _first_error(run_dir, since=since) is not None or _failed(run_dir, processes.deaths()):
            deadline = min(deadline, now + FAILURE_GRACE)
        elif is_finished(run_dir, ranks):
            deadline = min(deadline, now + FINISH_GRACE)
        time.sleep(POLL_SECONDS)
    return _failed(run_dir, processes.deaths())


def _failed(run_dir: Path, deaths: list[Death]) -> list[Death]:
    return [death for death in deaths if not (run_dir / "done" / f"rank{death.rank}").is_file()]


def _first_error(run_dir: Path, *, since: float) -> dict[str, Any] | None:
    """What the first rank that failed wrote, with its number as "rank"; an error of the user's goes before others.

    What an earlier launch left there, before the time `since`, does not count.
    """
    found = []
    for path in (run_dir / "errors").glob("rank*.json"):
        try:
            if path.stat().st_mtime < since - _CLOCK_SLACK:
                continue
            error = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # Still being written.
        found.append((not error["user_error"], path.stat().st_mtime_ns, {**error, "rank": path.stem[4:]}))
    return min(found, key=lambda item: item[:2])[2] if found else None


def _failure(run_dir: Path, deaths: list[Death], launcher_code: int, *, since: float) -> Outcome:
    """Say why a run failed: the user's error, else a rank that was killed, else a traceback, else what the logs say."""
    error = _first_error(run_dir, since=since)
    if error is not None and error["user_error"]:
        return Outcome(2, str(error["message"]))
    logs = f"logs: {run_dir / 'logs'}"
    killed = [death for death in deaths if death.signal is not None and death.signal not in _POLITE]
    # The launcher's exit code is the first dead rank's, modulo 256: above 192 it was a signal's.
    signum = killed[0].signal if killed else 256 - launcher_code if 192 < launcher_code < 256 else None
    if signum is not None and (killed or error is None):
        who = f"rank {killed[0].rank}" if killed else f"rank {deaths[0].rank}" if len(deaths) == 1 else "a rank"
        hint = "; the machine may have run out of memory" if signum == signal.SIGKILL else ""
        log = run_dir / "logs" / f"rank{killed[0].rank}.log" if killed else run_dir / "logs" / "launcher.log"
        return Outcome(1, f"{who} was killed by signal {signum} ({_name(signum)}){hint}\n{_tail(log)}{logs}")
    if error is not None:
        return Outcome(1, f"rank {error['rank']} failed\n{str(error['traceback']).rstrip()}\n{logs}")
    tail = _tail(run_dir / "logs" / "launcher.log")
    coded = [death for death in deaths if death.code]
    if coded:
        own = _tail(run_dir / "logs" / f"rank{coded[0].rank}.log")
        return Outcome(1, f"rank {coded[0].rank} ended with exit code {coded[0].code}\n{own or tail}{logs}")
    if launcher_code in (0, -signal.SIGTERM, -signal.SIGKILL):
        return Outcome(1, f"the deepspeed launcher ended before the ranks had finished: was it killed?\n{tail}{logs}")
    return Outcome(1, f"the deepspeed launcher ended with exit code {launcher_code}\n{tail}{logs}")


def _name(signum: int) -> str:
    return signal.Signals(signum).name if signum in {int(known) for known in signal.Signals} else "unknown"


def _tail(path: Path) -> str:
    """The end of a log, each line indented, with a line break at the end; "" if there is nothing."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
    except OSError:
        return ""
    return "".join(f"  | {line}\n" for line in lines)
