"""Supervises two of rank.py's ranks under the real DeepSpeed launcher, as launch.py does; prints the outcome."""

import sys
from pathlib import Path

from rlhf.launcher.command import NO_HOSTFILE, PROJECT, LaunchCommand, free_port
from rlhf.launcher.process import Outcome, supervise

RANK = Path(__file__).with_name("rank.py")


def command(run_dir: Path, behaviour: str) -> LaunchCommand:
    """The launcher's command for two ranks with a behaviour."""
    port = free_port()
    launcher = Path(sys.executable).with_name("deepspeed")
    options = [*NO_HOSTFILE, "--num_accelerators", "2", "--no_local_rank", "--master_port", str(port)]
    return LaunchCommand(
        argv=(str(launcher), *options, str(RANK), str(run_dir), behaviour),
        variables={"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)},
        port=port,
    )


def drive(run_dir: Path, behaviour: str) -> Outcome:
    """Run two ranks to their end."""
    return supervise(command(run_dir, behaviour), run_dir=run_dir, ranks=2, on_poll=lambda: None)


if __name__ == "__main__":
    outcome = drive(Path(sys.argv[1]), sys.argv[2])
    print(outcome.message)
    sys.exit(outcome.code)
