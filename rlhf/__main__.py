"""The worker that the DeepSpeed launcher starts once per rank: `python -m rlhf --config RUN/config.yaml`."""

import argparse
import contextlib
import importlib
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import MutableMapping
from pathlib import Path

_RANK_NAMES = {
    "RANK": ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID"),
    "LOCAL_RANK": ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "PALS_LOCAL_RANKID", "SLURM_LOCALID"),
    "WORLD_SIZE": ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS"),
}
# srun is given this file's path: the package's modules must not be found as top-level ones.
sys.path[:] = [entry for entry in sys.path if entry != os.path.dirname(os.path.abspath(__file__))]


def main() -> int:
    """Run the configured stage on this rank and return the exit code: 0, 1 (failure) or 2 (the user's to fix)."""
    parser = argparse.ArgumentParser(prog="python -m rlhf", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="config.yaml of a stage's run directory")
    path: Path = parser.parse_args().config
    run_dir = path.resolve().parent
    adopt_rank(os.environ)
    rank = int(os.environ.get("RANK", "0"))
    from rlhf.config.terminal import guard_output

    redirect_output(run_dir / "logs" / f"rank{rank}.log")
    guard_output()
    try:
        run_stage(path, run_dir)
        marker = run_dir / "done" / f"rank{rank}"
        marker.parent.mkdir(exist_ok=True)
        marker.touch()
    except (
        BaseException
    ) as error:  # Whatever it is, the launcher must learn of it; it is raised again by the exit code.
        record_error(run_dir / "errors" / f"rank{rank}.json", error)
        traceback.print_exc()
        return 2 if is_user_error(error) else 1
    return 0


def adopt_rank(environment: MutableMapping[str, str]) -> None:
    """Fill in RANK, LOCAL_RANK and WORLD_SIZE where srun or mpirun has started this process and says them otherwise.

    Under srun also MASTER_ADDR: Slurm sorts the machines, and the first of them has rank 0.
    """
    for name, others in _RANK_NAMES.items():
        found = next((environment[other] for other in others if other in environment), None)
        if name not in environment and found is not None:
            environment[name] = found
    first = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?", environment.get("SLURM_STEP_NODELIST", ""))
    if first is not None:
        environment.setdefault("MASTER_ADDR", "".join(part or "" for part in first.groups()))


def run_stage(path: Path, run_dir: Path) -> None:
    """Read the configuration, import the stage's loop and run it."""
    silence_warnings()
    from rlhf.launcher.watchdog import start_watchdog

    start_watchdog(run_dir)
    import torch

    from rlhf.stages import read_config

    config = read_config(path)
    torch.set_num_threads(config.hardware.threads_per_rank or 1)
    stage = importlib.import_module(f"rlhf.stages.{config.stage.name}.train")
    stage.run(config, run_dir)
    from rlhf.engine.distributed import shut_down

    shut_down()


def redirect_output(log: Path) -> None:
    """Send all of this process's output, also that of libraries, to its log file; without one to the launcher's."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        print(f"{log} cannot be written: {error.strerror}", file=sys.stderr)
        return
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(descriptor, stream.fileno())
    os.close(descriptor)


def silence_warnings() -> None:
    """Quiet what a user can do nothing about; errors and this project's own warnings stay."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", module=r"torch\..*")
    for name in ("DeepSpeed", "deepspeed", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def is_user_error(error: BaseException) -> bool:
    """Whether the message alone tells a user what to do."""
    from rlhf.config.errors import ConfigError, DataError, StoppedError
    from rlhf.config.storage import storage_problem

    return isinstance(error, ConfigError | DataError | StoppedError) or storage_problem(error) is not None


def told(error: BaseException, run_dir: Path) -> str:
    """An error's message; where a file could not be written it says what the run has written before."""
    from rlhf.config.storage import exported, storage_problem

    if problem := storage_problem(error):
        return f"{problem}, and give the same command again; {exported(run_dir)}"
    if (run_dir / "model" / "config.json").is_file() and not is_user_error(error):
        return f"{error}; {exported(run_dir)}"
    return str(error)


def record_error(path: Path, error: BaseException) -> None:
    """Write why this rank fails, for the launcher to show."""
    facts = {
        "type": type(error).__name__,
        "message": told(error, path.parents[1]),
        "traceback": traceback.format_exc(),
        "user_error": is_user_error(error),
    }
    from rlhf.config.writing import write_json

    with contextlib.suppress(OSError):
        write_json(path, facts)


if __name__ == "__main__":
    code = main()
    # A rank that failed must not wait for the others in an exit handler of the process group.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
