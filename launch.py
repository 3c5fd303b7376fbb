"""Compose a configuration, check it, and plan or start its stages: `python launch.py [group=option …] [key=value …]`.

Exit codes: 0 done, 1 a stage failed, 2 something for the user to mend (nothing was started), 128 + n interrupted by
signal n.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from rlhf.config.errors import ConfigError, DataError
from rlhf.config.explain import explain
from rlhf.config.origins import value_origins
from rlhf.launcher.sweep import JobResult, clear_results, sweep_directory, write_result
from rlhf.stages import from_composed, register_schemas
from rlhf.stages.start import Started, start

CONF = Path(__file__).resolve().parent / "conf"
USER_ERRORS = (ConfigError, DataError, HydraException, OmegaConfBaseException)


def main() -> int:
    """Run the command line and return the exit code."""
    codes: list[int] = []
    sweeps: list[Path] = []

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def job(composed: Any) -> float:
        hydra_config = HydraConfig.get()
        if hydra_config.mode is not RunMode.MULTIRUN:
            started = reported(composed, in_sweep=False)
            codes.append(started.code)
            return _returned(started)
        directory = sweep_directory(sys.argv[1:], name=hydra_config.runtime.choices.get("sweep"))
        if not sweeps:
            sweeps.append(directory)
            clear_results(directory)
        print(f"\n== {' '.join(hydra_config.overrides.task)}", flush=True)
        started = reported(composed, in_sweep=True)
        codes.append(started.code)
        write_result(directory, job_result(started, hydra_config, composed))
        if started.code > 128:
            sys.exit(started.code)  # An interruption ends a sweep, too.
        return _returned(started)

    show_traceback = "HYDRA_FULL_ERROR" in os.environ
    scratch = Path(tempfile.gettempdir(), f"rlhf-sweep-{os.getpid()}")
    # Hydra would print errors itself and exit with 1, and would leave a directory for every sweep.
    os.environ.update(HYDRA_FULL_ERROR="1", RLHF_SWEEP_DIR=str(scratch))
    register_schemas()
    try:
        job()
    except USER_ERRORS as error:
        if show_traceback:
            raise
        return complain(explain(error))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if sweeps:
            summarize(sweeps[0])
    return next((code for code in codes if code), 0)


def _returned(started: Started) -> float:
    """What an optimizing sweeper sees: a job without an objective counts as failed."""
    return float("nan") if started.objective is None else started.objective


def complain(message: str) -> int:
    """Print one message about something that the user can mend and return the exit code for it."""
    print(f"launch.py: {message}", file=sys.stderr, flush=True)
    return 2


def reported(composed: Any, *, in_sweep: bool) -> Started:
    """Start a composed configuration; what the user can mend becomes one message."""
    try:
        return start(from_composed(composed), value_origins(CONF), in_sweep=in_sweep)
    except USER_ERRORS as error:
        message = explain(error)
        return Started(code=complain(message), message=message.split("\n")[0], figures={})


def job_result(started: Started, hydra_config: Any, composed: Any) -> JobResult:
    """What a sweep's summary says of a job."""
    pairs = [override.split("=", 1) for override in hydra_config.overrides.task]
    given = {key.lstrip("+~"): value for key, value in (pair for pair in pairs if len(pair) == 2)}
    return JobResult(
        number=int(hydra_config.job.num),
        overrides={key: value for key, value in given.items() if key not in ("mode", "sweep")},
        code=started.code,
        run_dir=started.run_dir,
        message=started.message,
        metric=composed.stage.objective if str(composed.mode).endswith("run") else "",
        objective=started.objective,
        figures=dict(started.figures),
    )


def summarize(directory: Path) -> None:
    """Print a sweep's table and write it as CSV and as a picture."""
    from rlhf.stages.summary import summarize_sweep

    print(summarize_sweep(directory), flush=True)


if __name__ == "__main__":
    try:
        status = main()
    except KeyboardInterrupt:
        print("launch.py: interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)
