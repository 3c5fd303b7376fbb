"""Runs the DeepSpeed launcher and tells honestly how it went: the bare launcher leaves orphans and hides failures."""

import contextlib
import json
import os
import re
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

from rlhf.config.storage import exported, probe
from rlhf.launcher.command import PROJECT, LaunchCommand
from rlhf.launcher.processes import RUN_MARK, Death, RunProcesses, remove_shared_memory
from rlhf.launcher.watchdog import STOP, watchdog_variables

POLL_SECONDS = 0.15
# Time to write error files and leave, after the first rank failed, after a signal, and after all ranks have finished.
FAILURE_GRACE = 8.0
SIGNAL_GRACE = 8.0
FINISH_GRACE = 30.0
# Time in which the ranks of other machines see that they are to end; their file system may look only now and then.
ELSEWHERE_GRACE = 3.0
_TAIL_LINES = 20
_CLOCK_SLACK = 2.0  # Clocks of machines that share a file system differ.
_UNREACHABLE = 255  # ssh's own exit code
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
    Ranks of other machines learn from the file `stop` that they are to end.
    """
    log = run_dir / "logs" / "launcher.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    (run_dir / STOP).unlink(missing_ok=True)
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
        told = False
        try:
            deaths = _watch(command, launcher, processes, received, run_dir, ranks, on_poll=on_poll, since=started)
            _await_other_machines(command, run_dir, ranks, launcher)
        finally:
            told = _end(command, launcher, processes, run_dir, ranks, grace=0.0 if len(received) > 1 else 3.0)
            on_poll()
            remove_shared_memory(port=command.port, pids=processes.pids)
        if not run_dir.is_dir():
            return Outcome(1, f"{run_dir} was removed while its stage was training: all ranks have ended")
        if received:
            name = signal.Signals(received[0]).name
            return Outcome(128 + received[0], f"interrupted by {name}: all ranks have ended; logs: {run_dir / 'logs'}")
    if is_finished(run_dir, ranks):
        return Outcome(0)
    error, lost = _first_error(run_dir, since=started), _lost_machines(command, run_dir)
    if told and error is None and not deaths:
        why = "launch.py on another machine has ended this run: see what it says"
        return Outcome(1, f"{why}; logs: {run_dir / 'logs'}")
    return _failure(run_dir, error, deaths, lost, launcher.returncode)


def _elsewhere(command: LaunchCommand, ranks: int) -> bool:
    """Whether this machine's processes do not know when the ranks of other machines end, and cannot end them."""
    return command.by_ssh or (command.local_ranks is not None and len(command.local_ranks) < ranks)


def _end(
    command: LaunchCommand,
    launcher: "subprocess.Popen[bytes]",
    processes: RunProcesses,
    run_dir: Path,
    ranks: int,
    *,
    grace: float,
) -> bool:
    """End all processes here, and those of other machines if the run failed; return whether others had ended it."""
    stop = run_dir / STOP
    told, failed = stop.exists(), not is_finished(run_dir, ranks)
    if failed:
        with contextlib.suppress(OSError):  # A full disk. Where the directory is gone, ranks elsewhere end by that.
            stop.touch()
    if command.by_ssh:
        # Asked politely, it would end every DeepSpeed job of this user on all the machines.
        launcher.kill()
    processes.end(grace=grace)
    launcher.wait()
    if failed and _elsewhere(command, ranks):
        time.sleep(ELSEWHERE_GRACE)
    return told


def _await_other_machines(
    command: LaunchCommand, run_dir: Path, ranks: int, launcher: "subprocess.Popen[bytes]"
) -> None:
    """Give the ranks that other machines started time to write their markers."""
    deadline = time.monotonic() + FINISH_GRACE
    elsewhere = _elsewhere(command, ranks)
    while elsewhere and launcher.poll() == 0 and not is_finished(run_dir, ranks) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def _watch(
    command: LaunchCommand,
    launcher: "subprocess.Popen[bytes]",
    processes: RunProcesses,
    received: list[int],
    run_dir: Path,
    ranks: int,
    *,
    on_poll: Callable[[], None],
    since: float,
) -> list[Death]:
    """Wait until the launcher ends or has to be ended; return the ranks that died before, and of themselves."""
    deadline = float("inf")
    forwarded = False
    deaths: list[Death] = []
    here = 0 if command.by_ssh else ranks if command.local_ranks is None else len(command.local_ranks)
    while launcher.poll() is None and time.monotonic() < deadline and len(received) < 2:
        on_poll()
        processes.find_ranks(here)
        now = time.monotonic()
        if received and not forwarded:
            forwarded = True
            if command.by_ssh:
                break
            processes.send(received[0])
            deadline = min(deadline, now + SIGNAL_GRACE)
        deaths = _own_deaths(run_dir, processes, deaths)
        if not run_dir.is_dir():
            break  # Nothing of what is trained from here on could be written.
        told = (run_dir / STOP).exists()
        if deaths or told or _lost_machines(command, run_dir) or _first_error(run_dir, since=since) is not None:
            deadline = min(deadline, now + FAILURE_GRACE)
        elif is_finished(run_dir, ranks):
            deadline = min(deadline, now + FINISH_GRACE)
        time.sleep(POLL_SECONDS)
    return _own_deaths(run_dir, processes, deaths)


def _own_deaths(run_dir: Path, processes: RunProcesses, before: list[Death]) -> list[Death]:
    """The ranks that died without having finished; `before`, if by now another machine has told them to end."""
    seen = processes.deaths()
    deaths = before if (run_dir / STOP).exists() else seen
    return [death for death in deaths if not (run_dir / "done" / f"rank{death.rank}").is_file()]


def _lost_machines(command: LaunchCommand, run_dir: Path) -> list[tuple[str, int]]:
    """The machines whose ranks ended badly and the exit codes there, as pdsh reports them; it waits for the others."""
    if not command.by_ssh:
        return []
    try:
        log = (run_dir / "logs" / "launcher.log").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    reports = re.findall(r"^pdsh@\S+: (\S+): ssh exited with exit code (\d+)$", log, flags=re.MULTILINE)
    return [(machine, int(code)) for machine, code in reports]


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


def _failure(
    run_dir: Path, error: dict[str, Any] | None, deaths: list[Death], lost: list[tuple[str, int]], launcher_code: int
) -> Outcome:
    """Say why a run failed: the user's error, else a rank that was killed, else a traceback, else what the logs say."""
    if error is not None and error["user_error"]:
        return Outcome(2, str(error["message"]))
    logs = f"logs: {run_dir / 'logs'}"
    if error is None and (why := probe(run_dir)) is not None:
        # Then neither errors nor logs could be written.
        return Outcome(2, f"{why}, and give the same command again; {exported(run_dir)}")
    signals = [(f"rank {dead.rank}", f"rank{dead.rank}", dead.signal) for dead in deaths if dead.signal not in _POLITE]
    signals += [(f"a rank on {machine}", "launcher", _signal_of(code)) for machine, code in lost]
    if error is None or any(dead.signal is None and dead.code is None for dead in deaths):
        # Its launcher may have taken note of a death before it could be seen here; then its own code tells the signal.
        who = f"rank {deaths[0].rank}" if len(deaths) == 1 else "a rank"
        signals.append((who, "launcher", _signal_of(launcher_code)))
    for who, log, signum in signals:
        if signum is not None:
            hint = "; the machine may have run out of memory" if signum == signal.SIGKILL else ""
            tail = _tail(run_dir / "logs" / f"{log}.log")
            return Outcome(1, f"{who} was killed by signal {signum} ({_name(signum)}){hint}\n{tail}{logs}")
    if error is not None:
        return Outcome(1, f"rank {error['rank']} failed\n{str(error['traceback']).rstrip()}\n{logs}")
    tail = _tail(run_dir / "logs" / "launcher.log")
    coded = [death for death in deaths if death.code]
    if coded:
        own = _tail(run_dir / "logs" / f"rank{coded[0].rank}.log")
        return Outcome(1, f"rank {coded[0].rank} ended with exit code {coded[0].code}\n{own or tail}{logs}")
    if lost:
        machine, code = lost[0]
        what = "cannot be reached, or the connection broke: ssh" if code == _UNREACHABLE else "failed: its launcher"
        return Outcome(1, f"machine {machine} {what} ended with exit code {code}\n{tail}{logs}")
    if launcher_code in (0, -signal.SIGTERM, -signal.SIGKILL):
        return Outcome(1, f"the deepspeed launcher ended before the ranks had finished: was it killed?\n{tail}{logs}")
    return Outcome(1, f"the deepspeed launcher ended with exit code {launcher_code}\n{tail}{logs}")


def _signal_of(code: int) -> int | None:
    """The signal that ended a rank, from its launcher's exit code: that is the rank's, modulo 256."""
    return 256 - code if 192 < code < _UNREACHABLE else None


def _name(signum: int) -> str:
    return signal.Signals(signum).name if signum in {int(known) for known in signal.Signals} else "unknown"


def _tail(path: Path) -> str:
    """The end of a log, each line indented, with a line break at the end; "" if there is nothing."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
    except OSError:
        return ""
    return "".join(f"  | {line}\n" for line in lines)
