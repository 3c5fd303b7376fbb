"""What a run would do, as text: the resolved configuration, the commands, and each role's DeepSpeed configuration."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlhf.config.files import to_yaml
from rlhf.config.schema import Config
from rlhf.launcher.command import launch_command
from rlhf.launcher.ds_config import deepspeed_config
from rlhf.launcher.pipeline import StageRun
from rlhf.launcher.rundir import CONFIG


def plan_text(config: Config, runs: Sequence[StageRun], *, run_dir: Path, gpus: Sequence[int]) -> str:
    """Describe a run that `mode=run` would start; the rendezvous port is drawn anew then."""
    return "\n".join(_lines(config, runs, run_dir=run_dir, gpus=gpus))


def _lines(config: Config, runs: Sequence[StageRun], *, run_dir: Path, gpus: Sequence[int]) -> Iterator[str]:
    yield f"# Run directory: {run_dir}"
    yield f"# Configuration\n{to_yaml(config).rstrip()}"
    for run in runs:
        command = launch_command(run.config, config_path=run.directory / CONFIG, gpus=gpus)
        yield f"\n# Stage {run.name}: command\n{command.shell()}"
        for role in run.config.stage.roles():
            rendered = deepspeed_config(role, memory=run.config.memory, ranks=run.ranks)
            yield f"# Stage {run.name}: DeepSpeed configuration of the {role.name.replace('_', ' ')}"
            yield json.dumps(rendered, indent=2)
