"""Ends a run's processes when launch.py is gone or has given up, so that not even SIGKILL leaves a rank behind."""

import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path

LAUNCHER_PID = "RLHF_LAUNCHER_PID"
LAUNCHER_START = "RLHF_LAUNCHER_START"
STOP = "stop"  # launch.py writes it into a stage's directory; it reaches the ranks of other machines, too.
_INTERVAL = 1.0


def start_time(pid: int) -> str | None:
    """When a process started, in clock ticks since boot, or None if it is gone; tells a reused pid apart."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name in parentheses may itself hold spaces and parentheses.
    state, *rest = stat.rpartition(")")[2].split()
    return None if state in ("Z", "X") else rest[18]


def watchdog_variables() -> dict[str, str]:
    """The environment through which ranks learn which process they belong to: the calling one."""
    return {LAUNCHER_PID: str(os.getpid()), LAUNCHER_START: start_time(os.getpid()) or ""}


def start_watchdog(run_dir: Path, environment: Mapping[str, str] = os.environ) -> threading.Thread:
    """Watch launch.py from a daemon thread of a rank; when it is gone, SIGKILL the rank's whole process group.

    The group is the DeepSpeed launcher with all ranks of a machine. A rank that launch.py did not start itself, or a
    machine without /proc, has no process to watch, but every rank ends when the file `stop` appears in `run_dir`, or
    when that directory is removed.
    """
    pid, started = environment.get(LAUNCHER_PID), environment.get(LAUNCHER_START)
    watched = (int(pid), started) if pid and started else None
    thread = threading.Thread(target=_watch, args=(run_dir / STOP, watched), name="launcher-watchdog", daemon=True)
    thread.start()
    return thread


def _watch(stop: Path, watched: tuple[int, str] | None) -> None:
    while not _told(stop) and (watched is None or start_time(watched[0]) == watched[1]):
        time.sleep(_INTERVAL)
    os.killpg(os.getpgid(0), signal.SIGKILL)


def _told(stop: Path) -> bool:
    try:
        stop.parent.stat()
        return stop.exists()
    except FileNotFoundError:
        return True
    except OSError:
        return False  # A network file system that does not answer just now says nothing.
