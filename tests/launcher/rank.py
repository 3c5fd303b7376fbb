"""A rank without a model: started by the real DeepSpeed launcher, it ends in the way that its argument names."""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

from rlhf.__main__ import record_error
from rlhf.config.errors import DataError
from rlhf.launcher.watchdog import start_watchdog


def main(run_dir: Path, behaviour: str) -> int:
    """Behave as told and return the exit code."""
    rank = int(os.environ["RANK"])
    start_watchdog(run_dir)
    (run_dir / f"pid{rank}").write_text(f"{os.getpid()} {os.getppid()}", encoding="ascii")
    try:
        if behaviour != "finish":
            while len(list(run_dir.glob("pid?"))) < int(os.environ["WORLD_SIZE"]):
                time.sleep(0.05)
        if behaviour == "raise" and rank == 1:
            raise RuntimeError("the loss is a pumpkin")
        if behaviour == "user-error" and rank == 0:
            raise DataError("reviews.jsonl:7: no key 'prompt'")
        if behaviour == "killed" and rank == 1:
            time.sleep(1.0)  # The wrapper has seen both ranks by then.
            os.kill(os.getpid(), signal.SIGKILL)
        if behaviour == "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if behaviour != "finish":
            time.sleep(300)
    except Exception as error:
        record_error(run_dir / "errors" / f"rank{rank}.json", error)
        return 2 if isinstance(error, DataError) else 1
    with contextlib.suppress(FileExistsError):
        (run_dir / "done").mkdir()
    (run_dir / "done" / f"rank{rank}").touch()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
