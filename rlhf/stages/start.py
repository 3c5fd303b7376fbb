"""What launch.py does with a composed configuration: explain an option, plan a run, or start it. Imports no torch."""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from rlhf.config.advice import similar_keys
from rlhf.config.choices import RolloutBackend
from rlhf.config.errors import ConfigError
from rlhf.config.escapes import read_escapes
from rlhf.config.fields import bounds
from rlhf.config.files import write_config
from rlhf.config.model_directory import own_code
from rlhf.config.origins import field_docs, fields_by_key, flat_values, located, origin_of
from rlhf.config.roles import roles_of
from rlhf.config.schema import REWARD_MODEL, Config, LauncherKind, Mode, Normalize, Reuse, StageConfig
from rlhf.config.templates import template_problems, with_templates
from rlhf.config.terminal import shown, steer
from rlhf.config.validate import find_problems, raise_problems, value_problems
from rlhf.data.problems import source_problems
from rlhf.launcher.hardware import Machine, detect, machine_problems, resolve, unused_ranks
from rlhf.launcher.hosts import launcher_problems
from rlhf.launcher.pipeline import StageRun, changed_inputs, run_stages
from rlhf.launcher.plan import explanation, plan_files, plan_text, settings
from rlhf.launcher.rundir import (
    CONFIG,
    DATA,
    PLAN,
    check_free,
    check_run_dir,
    claimed,
    folder_beside,
    with_run_dir,
    write_files,
)
from rlhf.launcher.store import FOLDER, StageStore
from rlhf.models.score_rule import check_statistics, statistics_problem
from rlhf.planner.adapters import adapter_problems
from rlhf.planner.lengths import directory_problems, length_problems, packing_problems
from rlhf.planner.memory import (
    GIB,
    cache_problems,
    memory_problems,
    mix_problems,
    precision_problems,
    ranks_of,
    rollout_problems,
    stage_memory,
    substages,
)
from rlhf.rollout.scorers import scorer_problems
from rlhf.rollout.scorers.function import check_reference
from rlhf.rollout.vllm_version import check_installed
from rlhf.stages import stage_config_class
from rlhf.stages.conclude import conclude, objective
from rlhf.stages.pipeline.steps import stage_runs


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """How a run ended: its exit code, directory, objective (if it has one), and figures for a sweep's table."""

    code: int
    run_dir: str = ""
    message: str = ""
    objective: float | None = None
    figures: Mapping[str, Any]


def start(config: Config, origins: Mapping[str, str], *, in_sweep: bool) -> Started:
    """Do what `config.mode` says; raises ConfigError or DataError for what the user can mend."""
    read_escapes(config, origins)
    raise_problems(located(problem, dict(origins)) for problem in value_problems(config))
    if config.mode is Mode.explain:
        print(
            explained(
                config, resolve(config, detect(), adjustable=tuned_keys(origins), asked=asked_keys(origins)), origins
            )
        )
        return Started(code=0, figures={})
    machine = detect()
    resolved = resolve(with_templates(config), machine, adjustable=tuned_keys(origins), asked=asked_keys(origins))
    composed, config = config, with_run_dir(resolved)
    # In a sweep of plans, what does not fit is a row of the table like what does.
    check(config, machine, origins, must_fit=not (in_sweep and config.mode is Mode.plan))
    assert config.run_dir is not None
    run_dir = Path(config.run_dir)
    runs = stage_runs(config, run_dir)
    if (note := unused_ranks(composed, config, machine)) and not in_sweep:
        print(note, flush=True)
    if config.mode is Mode.plan:
        return plan(composed, config, runs, machine, origins, quiet=in_sweep)
    give_home(config)
    if config.mode is Mode.data:
        return show_data(config, run_dir)
    return run(config, runs, machine, in_sweep=in_sweep)


def give_home(config: Config) -> None:
    """Let libraries, here and in ranks, keep in cache_dir what they keep in a home directory, where there is none."""
    place = config.cache_dir or os.environ.get("RLHF_CACHE")
    if place and os.path.expanduser("~") == "~":
        os.environ.update({"HOME": os.path.abspath(place), "RLHF_CACHE": os.path.abspath(place)})


def tuned_keys(origins: Mapping[str, str]) -> set[str]:
    """The keys whose values come from the files of tuned values."""
    return {key for key, origin in origins.items() if origin.startswith("conf/tuned/")}


def asked_keys(origins: Mapping[str, str]) -> set[str]:
    """The keys that the command line or a recipe sets."""
    return {key for key, origin in origins.items() if not origin.startswith("conf/tuned/")}


def check_composed(config: Config, origins: Mapping[str, str]) -> None:
    """Raise one ConfigError with every problem of a composed configuration; start nothing."""
    raise_problems(located(problem, dict(origins)) for problem in value_problems(config))
    machine = detect()
    check(resolve(config, machine, adjustable=tuned_keys(origins), asked=asked_keys(origins)), machine, origins)


def check(config: Config, machine: Machine, origins: Mapping[str, str], *, must_fit: bool = True) -> None:
    """Raise one ConfigError with every problem of a resolved configuration, each with where its value came from.

    Model states that the hardware cannot hold are a problem if they `must_fit`.
    """
    problems = [*find_problems(config), *source_problems(config.data), *scorer_problems(config.scorer)]
    problems += template_problems(config)
    problems += reference_problems(config.stage, "stage")
    if not problems:
        # These compute with the values, so that values that cannot be come first.
        problems += [*length_problems(config), *directory_problems(config, config.stage)]
        problems += [*adapter_problems(config), *packing_problems(config), *mix_problems(config)]
        problems += [*rollout_problems(config), *precision_problems(config)]
        problems += [*memory_problems(config), *cache_problems(config)] if must_fit else []
    problems += launcher_problems(config)
    problems += machine_problems(config, machine)
    problems += backend_problems(config)
    problems += statistics_problems(config)
    raise_problems(located(problem, dict(origins)) for problem in problems)


def reward_directories(config: Config) -> Iterator[tuple[str, Path]]:
    """The key and directory of each reward model that is there already and whose own statistics normalise its scores.

    A pipeline's own reward model is not there yet.
    """
    scoring = any(role.name == REWARD_MODEL for stage in substages(config.stage) for role in roles_of(config, stage))
    if not scoring or config.scorer.normalize is not Normalize.model:
        return
    first = getattr(config.stage, "reward_model", None)
    keyed = [*([("stage.reward_model", first)] if first else []), *(("scorer.others", p) for p in config.scorer.others)]
    yield from ((key, Path(path)) for key, path in keyed if (Path(path) / "config.json").is_file())


def statistics_problems(config: Config) -> Iterator[str]:
    """Which reward models lack the numbers that their scores are normalised by."""
    for key, directory in reward_directories(config):
        try:
            problem = statistics_problem(directory)
        except ConfigError:
            continue  # A config.json that cannot be read is told by itself.
        if problem:
            yield f"{key}={directory}: {problem.removeprefix(f'{directory}/')}"


def code_notes(config: Config) -> Iterator[str]:
    """Which models bring code of their own, which is not run."""
    given = [config.model.path, config.reward_model.path, *(str(path) for _, path in reward_directories(config))]
    for path in dict.fromkeys(path for path in given if path is not None and own_code(Path(path))):
        yield f"note: {path} brings code of its own (auto_map), which is never run: transformers' own model is used"


def backend_problems(config: Config) -> Iterator[str]:
    """What is wrong with the package that a run generates with."""
    if config.mode is Mode.run and config.rollout.backend is RolloutBackend.vllm:
        try:
            check_installed()
        except ConfigError as error:
            yield from error.problems


def reference_problems(stage: StageConfig, key: str) -> Iterator[str]:
    """What is wrong with the functions of a user's own that a stage, or a pipeline's stages, name."""
    for entry in fields(stage):
        value = getattr(stage, entry.name)
        if isinstance(value, StageConfig):
            yield from reference_problems(value, f"{key}.{entry.name}")
        elif entry.name == "advantage" and ":" in value:
            try:
                check_reference(value, key=f"{key}.advantage")
            except ConfigError as error:
                yield from error.problems


def explained(config: Config, resolved: Config, origins: Mapping[str, str]) -> str:
    """The documentation, default, value and origin of the option `config.key`."""
    docs = field_docs(config)
    if config.key is None:
        raise ConfigError("key is not set: give the option to explain, as in  mode=explain key=stage.ppo.kl_coef")
    if config.key not in docs:
        near = similar_keys(config.key, docs)
        raise ConfigError(
            f"key={config.key}: there is no such option"
            + (f": did you mean {' or '.join(near)}?" if near else "; launch.py --help lists all")
        )
    values, used, plain = (dict(flat_values(each)) for each in (config, resolved, defaults_of(config)))
    if config.key not in values:
        inner = [key for key in values if key.startswith(f"{config.key}.")]
        listed = "\n".join(f"  {key} = {values[key]}" for key in inner)
        return f"{config.key}\n  {docs[config.key]}\n{listed}"
    return explanation(
        config.key,
        doc=docs[config.key],
        value=values[config.key],
        default=plain.get(config.key),
        resolved=used.get(config.key),
        origin=origin_of(config.key, dict(origins)),
        bounds=bounds(fields_by_key(config)[config.key]),
    )


def defaults_of(config: Config) -> Config:
    """The typed defaults of the configuration's stage."""
    return replace(Config(), stage=stage_config_class(config.stage.name)())


def plan(
    composed: Config,
    config: Config,
    runs: list[StageRun],
    machine: Machine,
    origins: Mapping[str, str],
    *,
    quiet: bool,
) -> Started:
    """Print what a run would do and, unless a run is there, write it to the run directory's folder plan."""
    run_dir = Path(config.run_dir or "")
    check_free(run_dir)
    changed = settings(composed, defaults_of(composed), origins)
    gpus = [gpu.index for gpu in machine.gpus]
    text = plan_text(config, runs, run_dir=run_dir, gpus=gpus, changed=changed)
    folder = folder_beside(run_dir, PLAN)
    try:
        write_files(folder, plan_files(config, runs, shown(text)))
    except OSError as error:
        raise ConfigError(f"run_dir={run_dir} cannot be written: {error.strerror}") from error
    if not quiet:
        print(f"{text}\n\n# Written to {folder}")
    return Started(code=0, run_dir=str(run_dir), figures=plan_figures(config, runs))


def show_data(config: Config, run_dir: Path) -> Started:
    """Print what the data are and write it to the run directory's folder data; start nothing."""
    check_free(run_dir)
    from rlhf.stages.doctor import examine

    folder = folder_beside(run_dir, DATA)
    steer(sys.stdout, examine(config, folder, colored=sys.stdout.isatty()) + "\n")
    return Started(code=0, run_dir=str(run_dir), figures={})


def plan_figures(config: Config, runs: list[StageRun]) -> dict[str, Any]:
    """What a table of plans shows of one: ranks, ZeRO stage, the largest stage's model states, and whether they fit."""
    estimates = [estimate for run in runs if (estimate := stage_memory(run.config, run.config.stage)) is not None]
    largest = max(estimates, key=lambda estimate: estimate.states, default=None)
    return {
        "ranks": ranks_of(config),
        "ZeRO": config.memory.zero_stage,
        "states GiB": largest.states / GIB if largest is not None else None,
        "of GiB": largest.capacity / GIB if largest is not None and largest.capacity is not None else None,
        "fits": "unknown" if largest is None else "no" if any(memory_problems(config)) else "yes",
    }


def run(config: Config, runs: list[StageRun], machine: Machine, *, in_sweep: bool) -> Started:
    """Prepare the data, start the stages, and write the report."""
    run_dir = Path(config.run_dir or "")
    was_finished = finished(runs, run_dir, config)
    changed = changed_since(runs) if was_finished else []
    if in_sweep and was_finished and (not changed or config.reuse is Reuse.finished):
        print(f"finished before, kept: {run_dir}", flush=True)
        return Started(code=0, run_dir=str(run_dir), objective=objective(runs), figures={})
    # A sweep brings its runs up to date; what somebody gave as a run of its own is not written over.
    anew = in_sweep and bool(changed)
    goes_on(config, runs, run_dir, anew=anew, changed=changed)
    from rlhf.stages.inputs import stage_inputs
    from rlhf.stages.preflight import preflight

    for _, directory in reward_directories(config):
        check_statistics(directory)
    for note in [*code_notes(config), *preflight(config).notes]:
        print(note, flush=True)
    with claimed(run_dir, name=_lock_name(config)):
        if goes_on(config, runs, run_dir, anew=anew, changed=changed):
            print(f"going on with {run_dir}", flush=True)
        (run_dir / "report.html").unlink(missing_ok=True)
        write_config(config, run_dir / CONFIG)
        gpus = [gpu.index for gpu in machine.gpus]
        store = _store(config, run_dir)
        outcome = run_stages(runs, gpus=gpus, stream=sys.stdout, inputs_of=stage_inputs, store=store)
        if outcome.code:
            print(f"launch.py: {outcome.message}", file=sys.stderr, flush=True)
        if not (config.launcher.node_rank or 0):
            outcome = conclude(runs, run_dir, outcome)
    result = objective(runs) if not outcome.code else None
    message = outcome.message.split("\n")[0]
    return Started(code=outcome.code, run_dir=str(run_dir), objective=result, message=message, figures={})


def _lock_name(config: Config) -> str:
    """Machines that share a run directory and are started by themselves do not lock each other out."""
    return f".lock-{config.launcher.node_rank}" if config.launcher.kind is LauncherKind.no_ssh else ".lock"


def _store(config: Config, run_dir: Path) -> StageStore | None:
    # Machines that are started by themselves could not agree on who waits and who trains.
    if config.reuse is Reuse.off or config.launcher.kind is LauncherKind.no_ssh:
        return None
    from rlhf.stages.inputs import stage_key

    return StageStore(run_dir.parent / FOLDER, key_of=stage_key, stream=sys.stdout)


def finished(runs: list[StageRun], run_dir: Path, config: Config) -> bool:
    """Whether a directory holds this very run, complete."""
    if not (run_dir / CONFIG).is_file() or not _complete(runs, run_dir):
        return False
    try:
        check_run_dir(run_dir, config, finished=False)
    except ConfigError:
        return False
    return True


def _complete(runs: list[StageRun], run_dir: Path) -> bool:
    return all(run.is_finished for run in runs) and (run_dir / "report.html").is_file()


def changed_since(runs: list[StageRun]) -> list[str]:
    """What the stages of a finished run were made of and is no longer the same, by name."""
    from rlhf.stages.inputs import stage_inputs

    return list(dict.fromkeys(name for run in runs for name in changed_inputs(run, stage_inputs)))


def goes_on(
    config: Config, runs: list[StageRun], run_dir: Path, *, anew: bool = False, changed: Sequence[str] = ()
) -> bool:
    """Whether an unfinished run in the directory goes on; raises ConfigError if the directory cannot be used.

    A finished one goes on `anew` if that is asked; else what has `changed` since is told.
    """
    try:
        return check_run_dir(run_dir, config, finished=_complete(runs, run_dir) and not anew)
    except ConfigError as error:
        if not changed:
            raise
        raise ConfigError(f"{error}. Its {' and '.join(changed)} changed since it finished") from error
