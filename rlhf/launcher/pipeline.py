"""Starts the stages of a run one after the other, each by its own launch of DeepSpeed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from rlhf.config.files import write_config
from rlhf.config.schema import Config
from rlhf.launcher.command import launch_command
from rlhf.launcher.ds_config import role_files
from rlhf.launcher.process import Outcome, is_finished, supervise
from rlhf.launcher.progress import ProgressFollower
from rlhf.launcher.rundir import COMMAND, CONFIG, move_aside, write_files
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
        """Whether all ranks have finished."""
        return is_finished(self.directory, self.ranks)


def run_stages(
    runs: Sequence[StageRun], *, run_dir: Path, gpus: Sequence[int], stream: TextIO, store: StageStore | None = None
) -> Outcome:
    """Run the stages in order and stop at the first that fails.

    Stages that have finished before are kept, and those that another run has trained with the same inputs are taken
    from the store, if one is given.
    """
    for run in runs:
        if run.is_finished:
            print(f"{run.name}: finished before, kept: {run.directory}", file=stream, flush=True)
            continue
        # Of several machines that start by themselves, the first one clears up.
        aside = None if run.config.launcher.node_rank else move_aside(run.directory)
        if aside is not None:
            print(f"{run.name}: starts anew; what was half-written is now {aside}", file=stream, flush=True)
        outcome = _train_or_take(run, store, gpus=gpus, stream=stream)
        if outcome.code:
            return Outcome(outcome.code, f"stage {run.name}: {outcome.message}")
    return Outcome(0)


def _train_or_take(run: StageRun, store: StageStore | None, *, gpus: Sequence[int], stream: TextIO) -> Outcome:
    key = store.key_of(run.config) if store is not None else None
    if store is None or key is None:
        return start_stage(run, gpus=gpus, stream=stream)
    with store.reserved(key, name=run.name):
        entry = store.find(key)
        if entry is not None:
            trained_by = store.take(entry, run.directory)
            write_config(run.config, run.directory / CONFIG)
            print(f"{run.name}: reused, trained with the same inputs by {trained_by}", file=stream, flush=True)
            return Outcome(0)
        outcome = start_stage(run, gpus=gpus, stream=stream)
        if not outcome.code:
            store.keep(key, run.directory)
        return outcome


def start_stage(run: StageRun, *, gpus: Sequence[int], stream: TextIO) -> Outcome:
    """Write a stage's configuration and command, launch it and show its progress until it ends."""
    path = run.directory / CONFIG
    node_rank = run.config.launcher.node_rank or 0
    command = launch_command(run.config, config_path=path, gpus=gpus, node_rank=node_rank)
    write_config(run.config, path)
    files = {file.name: text for file, text in command.files.items()}
    files[f"command-{node_rank}.txt" if node_rank else COMMAND] = f"{command.shell()}\n"
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
