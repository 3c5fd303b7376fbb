"""The DeepSpeed launcher's command line and environment for one stage."""

import os
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf.config.schema import Accelerator, Config

PROJECT = Path(__file__).resolve().parents[2]
# A surrounding distributed job must not leak into this one.
_FOREIGN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_SIZE")


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchCommand:
    """What starts the ranks: argv, the variables added to the environment, and the port of the rendezvous."""

    argv: tuple[str, ...]
    variables: Mapping[str, str]
    port: int

    def shell(self) -> str:
        """The command as a line for a shell; it holds no secrets, which stay in the inherited environment."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.variables.items()]
        return " ".join([*variables, shlex.join(self.argv)])

    def environment(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """The ranks' environment."""
        environment = {name: value for name, value in inherited.items() if name not in _FOREIGN}
        if "RLHF_CACHE" in environment:
            # Ranks run in another directory than the user.
            environment["RLHF_CACHE"] = os.path.abspath(os.path.expanduser(environment["RLHF_CACHE"]))
        return environment | dict(self.variables)


def free_port() -> int:
    """A TCP port that nobody listens on right now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def launch_command(config: Config, *, config_path: Path, gpus: Sequence[int]) -> LaunchCommand:
    """The command for a resolved configuration; `gpus` are the indices that may be used, in order."""
    hardware = config.hardware
    ranks = hardware.gpus_per_node or 1
    on_cpu = hardware.accelerator is Accelerator.cpu
    port = config.launcher.master_port or free_port()
    module = ["--no_local_rank", "--master_port", str(port), "--module", "rlhf", "--config", str(config_path)]
    variables = {
        "OMP_NUM_THREADS": str(hardware.threads_per_rank or 1),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH", "")])),
    }
    if on_cpu:
        variables["DS_ACCELERATOR"] = "cpu"
    argv = [*_launcher(), *_resources(ranks, on_cpu=on_cpu, gpus=gpus), *module]
    return LaunchCommand(argv=tuple(argv), variables=variables, port=port)


def _launcher() -> list[str]:
    """The `deepspeed` script of this interpreter's environment, or the module that it calls."""
    script = Path(sys.executable).with_name("deepspeed")
    return [str(script)] if script.is_file() else [sys.executable, "-m", "deepspeed.launcher.runner"]


def _resources(ranks: int, *, on_cpu: bool, gpus: Sequence[int]) -> list[str]:
    if on_cpu:
        # The launcher counts NUMA nodes on a CPU; this option may exceed them.
        return ["--num_accelerators", str(ranks)]
    chosen = list(gpus[:ranks])
    if not chosen or chosen == list(range(ranks)):
        return ["--num_gpus", str(ranks)]
    # With --num_gpus the launcher drops CUDA_VISIBLE_DEVICES and takes the first devices.
    return ["--include", f"localhost:{','.join(map(str, chosen))}"]
