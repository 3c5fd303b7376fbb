"""Compose a configuration, check it, and start its stages: `python launch.py [group=option …] [key=value …]`.

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
from rlhf.config.files import write_config
from rlhf.config.schema import Config, Mode
from rlhf.config.validate import validate
from rlhf.launcher.hardware import detect, resolve
from rlhf.launcher.pipeline import StageRun, run_stages
from rlhf.launcher.plan import plan_text
from rlhf.launcher.rundir import CONFIG, check_run_dir, claimed, with_run_dir
from rlhf.stages import from_composed, register_schemas
from rlhf.stages.pipeline.steps import stage_runs

USER_ERRORS = (ConfigError, DataError, HydraException, OmegaConfBaseException)


def main() -> int:
    """Run the command line and return the exit code."""
    codes: list[int] = []

    @hydra.main(version_base="1.3", config_path=str(Path(__file__).resolve().parent / "conf"), config_name="config")
    def job(composed: Any) -> None:
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            print(f"\n== {' '.join(HydraConfig.get().overrides.task)}", flush=True)
        codes.append(reported(composed))
        if codes[-1] > 128:
            sys.exit(codes[-1])  # An interruption ends a sweep, too.

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
    return next((code for code in codes if code), 0)


def complain(message: str) -> int:
    """Print one message about something that the user can mend and return the exit code for it."""
    print(f"launch.py: {message}", file=sys.stderr, flush=True)
    return 2


def reported(composed: Any) -> int:
    """Launch a composed configuration; what the user can mend becomes one message."""
    try:
        return launch(from_composed(composed))
    except USER_ERRORS as error:
        return complain(explain(error))


def launch(config: Config) -> int:
    """Resolve, validate, and plan or run a configuration; return the exit code."""
    machine = detect()
    config = with_run_dir(resolve(config, machine))
    validate(config, gpus=len(machine.gpus))
    assert config.run_dir is not None
    run_dir = Path(config.run_dir)
    runs = stage_runs(config, run_dir)
    if config.mode is Mode.plan:
        print(plan_text(config, runs, run_dir=run_dir, gpus=machine.gpus))
        return 0
    check(config, runs, run_dir)
    from rlhf.stages.preflight import preflight

    preflight(config)
    with claimed(run_dir):
        if check(config, runs, run_dir):
            print(f"going on with {run_dir}", flush=True)
        write_config(config, run_dir / CONFIG)
        outcome = run_stages(runs, run_dir=run_dir, gpus=machine.gpus, stream=sys.stdout)
        if outcome.code:
            print(f"launch.py: {outcome.message}", file=sys.stderr, flush=True)
        conclude(runs, run_dir, finished=not outcome.code)
    return outcome.code


def check(config: Config, runs: list[StageRun], run_dir: Path) -> bool:
    """Whether an unfinished run in the directory goes on; raises ConfigError if the directory cannot be used."""
    complete = all(run.is_finished for run in runs) and (run_dir / "report.html").is_file()
    return check_run_dir(run_dir, config, resumable=len(runs) > 1, finished=complete)


def conclude(runs: list[StageRun], run_dir: Path, *, finished: bool) -> None:
    """Write the report, also of a run that failed, and say where everything is."""
    from rlhf.tracking.report import write_report

    _, report = write_report(run_dir)
    print(f"report: {report}")
    if not finished:
        return
    print(f"model:  {runs[-1].directory / 'model'}")
    if runs[-1].name != "rm":
        print(f"talk:   python -m rlhf.chat {os.path.relpath(run_dir)}")


if __name__ == "__main__":
    try:
        status = main()
    except KeyboardInterrupt:
        print("launch.py: interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)
