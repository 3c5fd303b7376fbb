"""Ends a run's processes when launch.py is gone, so that even SIGKILL leaves no rank behind."""

import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path

LAUNCHER_PID = "RLHF_LAUNCHER_PID"
LAUNCHER_START = "RLHF_LAUNCHER_START"
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


def start_watchdog(environment: Mapping[str, str] = os.environ) -> threading.Thread | None:
    """Watch launch.py from a daemon thread of a rank; when it is gone, SIGKILL the rank's whole process group.

    The group is the DeepSpeed launcher with all ranks. A rank that launch.py did not start has nothing to watch, and
    a machine without /proc cannot: None is returned then.
    """
    pid, started = environment.get(LAUNCHER_PID), environment.get(LAUNCHER_START)
    if not pid or not started:
        return None
    thread = threading.Thread(target=_watch, args=(int(pid), started), name="launcher-watchdog", daemon=True)
    thread.start()
    return thread


def _watch(pid: int, started: str) -> None:
    while start_time(pid) == started:
        time.sleep(_INTERVAL)
    os.killpg(os.getpgid(0), signal.SIGKILL)
