"""Compose a configuration, check it, and plan or start its stages: `python launch.py [group=option …] [key=value …]`.

Exit codes: 0 done, 1 a stage failed, 2 something for the user to mend or a health rule ended the run, 128 + n
interrupted by signal n.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from rlhf.interpreter import LAUNCHING, require

require("launch.py", LAUNCHING)

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from rlhf.config.completion import complete
from rlhf.config.compose import CommandLine, compose_given, composing, explained, find_mistakes, print_usage
from rlhf.config.errors import ConfigError, DataError, listed
from rlhf.config.explain import explain
from rlhf.config.origins import value_origins
from rlhf.config.secrets import names_secret, without_secrets
from rlhf.config.storage import storage_problem
from rlhf.config.terminal import guard_output
from rlhf.launcher.sweep import SWEEP, JobResult, clear_results, read_results, sweep_directory, write_result
from rlhf.stages import from_composed, register_schemas
from rlhf.stages.start import Started, check_composed, start

CONF = Path(__file__).resolve().parent / "conf"
USER_ERRORS = (ConfigError, DataError, HydraException, OmegaConfBaseException, yaml.YAMLError)


def main() -> int:
    """Run the command line and return the exit code."""
    guard_output()
    codes: list[int] = []
    begun = []

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def job(composed: Any) -> float | None:
        guard_output()  # A job of a sweep may run in a process of its own.
        hydra_config = HydraConfig.get()
        swept = hydra_config.mode is RunMode.MULTIRUN
        begun.append(hydra_config.job.num if swept else 0)
        if swept:
            print(f"\n== {without_secrets(' '.join(hydra_config.overrides.task))}", flush=True)
        started = reported(composed, in_sweep=swept)
        codes.append(started.code)
        if swept:
            codes.append(recorded(job_result(started, hydra_config, composed)))
        if started.code > 128:
            sys.exit(started.code)  # An interruption ends a sweep, too.
        return started.objective  # A job without one counts as failed for a sweeper that optimizes.

    show_traceback = "HYDRA_FULL_ERROR" in os.environ
    if not os.path.isdir("."):
        return complain("the working directory has been removed: change to another one (cd)")
    try:
        line = CommandLine.parse(sys.argv[1:], CONF)
    except PermissionError as error:
        return complain(storage_problem(error) or str(error))
    given = dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
    sweep = sweep_directory(sys.argv[1:], name=given.get("sweep"))
    # Hydra would print errors itself and exit with 1. Jobs of a sweep may run in other processes, on other machines.
    os.environ.update({"HYDRA_FULL_ERROR": "1", "RLHF_SWEEP_DIR": str(sweep / "hydra"), SWEEP: str(sweep)})
    clear_results(sweep)
    register_schemas()
    try:
        if line.problems or line.foreign:
            return complain(every_problem(line))
        if line.completion:
            return complete(sys.argv[1:], CONF)
        if line.wants_help:
            print_usage(CONF, line)
        else:
            sys.argv[1:] = line.arguments
            job()
    except Exception as error:
        said = None if show_traceback else said_of(error, line, begun=bool(begun))
        if said is None:
            raise
        if said:
            return complain(said)
    finally:
        codes += conclude(sweep)
    return next((code for code in codes if code), 0)


def said_of(error: Exception, line: CommandLine, *, begun: bool) -> str | None:
    """What to say of an error that ended everything: nothing of one that is none; None if nobody expects it."""
    if isinstance(error, USER_ERRORS):
        return every_problem(line) or without_secrets(explain(error))
    if (problem := storage_problem(error)) is not None:
        return problem
    if "`Study.stop` is supposed to be invoked" in str(error):
        return ""  # Optuna's grid has nothing left to try; its sweeper does not expect that of a last job that failed.
    if not begun:  # YAML and Hydra raise whatever they raise for files and values that they do not expect.
        return every_problem(line) or without_secrets(explain(error))
    if str(error).startswith("No trials are completed yet"):  # Optuna's, where no job came to a result.
        return str(error)
    return None


def conclude(sweep: Path) -> list[int]:
    """Sum up a sweep's jobs, if there were any, and return their exit codes."""
    results = read_results(sweep)
    if not list((sweep / "hydra").glob(".submitit")):
        shutil.rmtree(sweep / "hydra", ignore_errors=True)
    if not results:
        remove_empty(sweep)
        return []
    from rlhf.stages.summary import summarize_sweep

    text, problem = summarize_sweep(sweep)
    print(text, flush=True)
    if problem:
        print(f"launch.py: {problem}", file=sys.stderr, flush=True)
    return [*(result.code for result in results), int(bool(problem))]


def remove_empty(sweep: Path) -> None:
    """Remove a sweep's directory and those above it that hold nothing: a sweep that cannot be composed leaves none."""
    for folder in (sweep, sweep.parent, sweep.parent.parent):
        if not folder.is_dir() or any(folder.iterdir()):
            return
        folder.rmdir()


def every_problem(line: CommandLine) -> str:
    """All that is wrong with a command line that cannot be composed, as one message ("" if that cannot be told)."""
    with composing(CONF):
        found = find_mistakes(line)
        if not line.composable:
            return without_secrets(listed(found.problems))
        try:
            composed = compose_given(line, found.accepted)
            check_composed(from_composed(composed), value_origins(CONF))
        except ConfigError as error:
            found.problems += error.problems
        except Exception as error:
            found.problems += explained(error, line, "", found.accepted)
    return without_secrets(listed(found.problems))


def complain(message: str) -> int:
    """Print one message about something that the user can mend and return the exit code for it."""
    print(f"launch.py: {message}", file=sys.stderr, flush=True)
    return 2


def reported(composed: Any, *, in_sweep: bool) -> Started:
    """Start a composed configuration; what the user can mend becomes one message."""
    try:
        if not in_sweep and HydraConfig.get().runtime.choices.get("sweep"):
            raise ConfigError("sweep=… chooses many runs: add -m, as in  python launch.py -m sweep=NAME")
        return start(from_composed(composed), value_origins(CONF), in_sweep=in_sweep)
    except OSError as error:
        problem = storage_problem(error)
        if problem is None:
            raise
        message = f"{problem}, and give the same command again"
        return Started(code=complain(message), message=message, figures={})
    except USER_ERRORS as error:
        message = without_secrets(explain(error))
        return Started(code=complain(message), message=message.split("\n")[0], figures={})


def job_result(started: Started, hydra_config: Any, composed: Any) -> JobResult:
    """What a sweep's summary says of a job."""
    texts = [text.encode("utf-8", "backslashreplace").decode() for text in hydra_config.overrides.task]
    pairs = [text.split("=", 1) for text in texts]
    given = {
        key.lstrip("+~"): "***" if names_secret(key) else value for key, value in (p for p in pairs if len(p) == 2)
    }
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


def recorded(result: JobResult) -> int:
    """Note a job's result for the sweep's table; the exit code for it."""
    try:
        write_result(Path(os.environ[SWEEP]), result)
    except OSError as error:
        why = storage_problem(error) or str(error)
        print(f"launch.py: job {result.number} will not be in the sweep's table: {why}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    try:
        status = main()
    except KeyboardInterrupt:
        print("launch.py: interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)
