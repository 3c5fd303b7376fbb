"""Starts the stages of a run one after the other, each by its own launch of DeepSpeed."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from rlhf.config.errors import ConfigError, DataError
from rlhf.config.files import write_config
from rlhf.config.schema import Config, Reuse
from rlhf.config.storage import storage_problem
from rlhf.launcher.command import launch_command
from rlhf.launcher.ds_config import role_files
from rlhf.launcher.process import Outcome, is_finished, supervise
from rlhf.launcher.progress import ProgressFollower
from rlhf.launcher.rundir import COMMAND, CONFIG, INPUTS, move_aside, write_files
from rlhf.launcher.store import StageStore


@dataclass(frozen=True, kw_only=True, slots=True)
class StageRun:
    """One stage of a run: its resolved configuration and where it is written."""

    config: Config
    directory: Path

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.config.stage.name

    @property
    def ranks(self) -> int:
        """Ranks over all machines."""
        return (self.config.hardware.gpus_per_node or 1) * self.config.hardware.nodes

    @property
    def is_finished(self) -> bool:
        """Whether all ranks have finished, and the model that they wrote is there."""
        return not self.lost_its_model and is_finished(self.directory, self.ranks)

    @property
    def lost_its_model(self) -> bool:
        """Whether all ranks have finished and somebody has removed the model since."""
        return is_finished(self.directory, self.ranks) and not (self.directory / "model").is_dir()


InputsOf = Callable[[Config], Mapping[str, str]]
"""What a stage is made of, as a digest for each kind of it: options, data, weights, ranks, code."""


def run_stages(
    runs: Sequence[StageRun],
    *,
    gpus: Sequence[int],
    stream: TextIO,
    inputs_of: InputsOf,
    store: StageStore | None = None,
) -> Outcome:
    """Run the stages in order and stop at the first that fails.

    Stages that have finished before are kept if they are made of what they would be made of now, and those that another
    run has trained with the same inputs are taken from the store, if one is given.
    """
    for run in runs:
        if run.is_finished and _kept(run, inputs_of, stream):
            continue
        # Of several machines that start by themselves, the first one clears up.
        if not run.config.launcher.node_rank:
            if run.lost_its_model:
                print(f"{run.name}: finished before, but its model is gone: trained again", file=stream, flush=True)
            name = "earlier" if run.is_finished else "failed"
            aside = move_aside(run.directory, name=name)
            if aside is not None:
                print(f"{run.name}: starts anew; what was there is now {aside}", file=stream, flush=True)
        outcome = _train_or_take(run, inputs_of, store, gpus=gpus, stream=stream)
        if outcome.code:
            return Outcome(outcome.code, f"stage {run.name}: {outcome.message}")
    return Outcome(0)


def changed_inputs(run: StageRun, inputs_of: InputsOf) -> list[str]:
    """What a finished stage was made of and what is no longer the same: its data, weights, code, …, by name."""
    try:
        made_of = json.loads((run.directory / INPUTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        made_of = None
    if not isinstance(made_of, dict):
        return ["inputs, of which there is no record,"]
    return [name for name, digest in inputs_of(run.config).items() if made_of.get(name) != digest]


def _kept(run: StageRun, inputs_of: InputsOf, stream: TextIO) -> bool:
    """Say whether a finished stage is kept, and why."""
    changed = " and ".join(changed_inputs(run, inputs_of))
    if not changed:
        told = f"finished before with the same data, weights and code, kept: {run.directory}"
    elif run.config.reuse is Reuse.finished:
        told = f"kept, although its {changed} changed since it finished (reuse=finished): {run.directory}"
    else:
        told = f"trained again: its {changed} changed since it finished (reuse=finished keeps it)"
    print(f"{run.name}: {told}", file=stream, flush=True)
    return not changed or run.config.reuse is Reuse.finished


def _train_or_take(
    run: StageRun, inputs_of: InputsOf, store: StageStore | None, *, gpus: Sequence[int], stream: TextIO
) -> Outcome:
    key = store.key_of(run.config) if store is not None else None
    inputs = json.dumps(inputs_of(run.config), indent=1)
    if store is None or key is None:
        return _train(run, inputs_of, inputs, gpus=gpus, stream=stream)
    try:
        place = store.reserved(key, name=run.name)
    except OSError as error:  # Of somebody else, as may be where two share a folder of runs.
        why = storage_problem(error) or str(error)
        print(f"{run.name}: no stage of other runs is used, nor is this one kept: {why}", file=stream, flush=True)
        return _train(run, inputs_of, inputs, gpus=gpus, stream=stream)
    with place:
        entry = store.find(key)
        if entry is not None:
            trained_by = store.take(entry, run.directory)
            write_config(run.config, run.directory / CONFIG)
            print(f"{run.name}: reused, trained with the same inputs by {trained_by}", file=stream, flush=True)
            return Outcome(0)
        outcome = start_stage(run, inputs, gpus=gpus, stream=stream)
        if not outcome.code and not _moved(run, inputs_of, stream):
            try:
                store.keep(key, run.directory)
            except OSError as error:  # What it would have saved is another run's time.
                why = storage_problem(error) or str(error)
                print(f"{run.name}: trained, but not kept for other runs: {why}", file=stream, flush=True)
        return outcome


def _train(run: StageRun, inputs_of: InputsOf, inputs: str, *, gpus: Sequence[int], stream: TextIO) -> Outcome:
    outcome = start_stage(run, inputs, gpus=gpus, stream=stream)
    if not outcome.code:
        _moved(run, inputs_of, stream)
    return outcome


def _moved(run: StageRun, inputs_of: InputsOf, stream: TextIO) -> bool:
    """Whether a stage's inputs changed while it was trained: it is not known what it was made of, and that is told."""
    if run.config.launcher.node_rank:
        return False  # The first machine looks.
    try:
        changed = changed_inputs(run, inputs_of)
    except (ConfigError, DataError, OSError):  # Removed meanwhile: that must not take the trained model's report away.
        changed = ["data"]
    if changed:
        recorded = json.loads((run.directory / INPUTS).read_text(encoding="utf-8"))
        write_files(run.directory, {INPUTS: json.dumps(recorded | dict.fromkeys(changed), indent=1) + "\n"})
        told = f"its {' and '.join(changed)} changed while it was trained, so it may be made of both; the same command"
        print(f"{run.name}: {told} will train it again (reuse=finished keeps it)", file=stream, flush=True)
    return bool(changed)


def start_stage(run: StageRun, inputs: str, *, gpus: Sequence[int], stream: TextIO) -> Outcome:
    """Write a stage's configuration, inputs and command, launch it and show its progress until it ends."""
    path = run.directory / CONFIG
    node_rank = run.config.launcher.node_rank or 0
    command = launch_command(run.config, config_path=path, gpus=gpus, node_rank=node_rank)
    write_config(run.config, path)
    files = {file.name: text for file, text in command.files.items()}
    files[f"command-{node_rank}.txt" if node_rank else COMMAND] = f"{command.shell()}\n"
    if not node_rank:
        files[INPUTS] = f"{inputs}\n"
    write_files(run.directory, files)
    write_files(run.directory / "deepspeed", role_files(run.config))
    hardware = run.config.hardware
    print(
        f"{run.name}: {run.ranks} ranks on {hardware.accelerator.name}, {run.config.memory.precision.name}, "
        f"ZeRO-{run.config.memory.zero_stage}, logs in {run.directory / 'logs'}",
        file=stream,
        flush=True,
    )
    follower = ProgressFollower(run.directory / "progress.jsonl", stream)
    try:
        return supervise(command, run_dir=run.directory, ranks=run.ranks, on_poll=follower.poll)
    finally:
        follower.finish()
