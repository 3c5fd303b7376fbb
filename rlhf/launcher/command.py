"""The DeepSpeed launcher's command line, files and environment for one stage."""

import os
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlhf.config.schema import Accelerator, Config, LauncherKind
from rlhf.launcher.hosts import hosts_of

PROJECT = Path(__file__).resolve().parents[2]
# A surrounding distributed job must not leak into this one.
_FOREIGN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_SIZE")
# Several machines that start by themselves cannot ask one of them for a free port.
SHARED_PORT = 29500
HOSTFILE, ENVIRONMENT = "hostfile", "environment"


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchCommand:
    """What starts the ranks: argv, the variables added to the environment, the port, and files that it reads.

    `files` maps paths to contents; they are written before the launch. `local_ranks` are the ranks that run on this
    machine, or None if that cannot be told.
    """

    argv: tuple[str, ...]
    variables: Mapping[str, str]
    port: int
    files: Mapping[Path, str] = field(default_factory=dict)
    local_ranks: range | None = None

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


def launch_command(config: Config, *, config_path: Path, gpus: Sequence[int], node_rank: int = 0) -> LaunchCommand:
    """The command for a resolved configuration.

    Args:
        config: one stage's.
        config_path: its config.yaml, which every rank reads.
        gpus: indices of this machine's GPUs that may be used, in order.
        node_rank: the machine whose command it is (launcher.kind=no_ssh).
    """
    hardware, launcher = config.hardware, config.launcher
    ranks = hardware.gpus_per_node or 1
    no_ssh = launcher.kind is LauncherKind.no_ssh
    port = launcher.master_port or (SHARED_PORT if no_ssh else free_port())
    variables = _variables(config)
    target = ["--no_local_rank", "--master_port", str(port), "--module", "rlhf", "--config", str(config_path)]
    if launcher.kind is LauncherKind.local:
        on_cpu = hardware.accelerator is Accelerator.cpu
        argv = [*_launcher(), *_resources(ranks, on_cpu=on_cpu, gpus=gpus), *target]
        return LaunchCommand(argv=tuple(argv), variables=variables, port=port, local_ranks=range(ranks))
    folder = config_path.parent
    hosts = hosts_of(config) or {f"node{index}": list(range(ranks)) for index in range(hardware.nodes)}
    files = {folder / HOSTFILE: "".join(f"{name} slots={len(slots)}\n" for name, slots in hosts.items())}
    argv = [*_launcher(), "--hostfile", str(folder / HOSTFILE)]
    address = launcher.master_addr or next(iter(hosts))
    if no_ssh:
        argv += ["--no_ssh", "--node_rank", str(node_rank), "--master_addr", address, *target]
        local = range(node_rank * ranks, (node_rank + 1) * ranks)
        return LaunchCommand(argv=tuple(argv), variables=variables, port=port, files=files, local_ranks=local)
    # Read by the launcher and passed on to every machine.
    passed = variables | {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    files[folder / ENVIRONMENT] = "".join(f"{name}={value}\n" for name, value in passed.items())
    variables["DS_ENV_FILE"] = str(folder / ENVIRONMENT)
    argv += [*_several_machines(config, hosts, address), *target]
    if launcher.kind is LauncherKind.slurm:
        # DeepSpeed's srun command leaves --module out, so that a path has to be named.
        argv[argv.index("--module") : argv.index("rlhf") + 1] = [str(PROJECT / "rlhf" / "__main__.py")]
    return LaunchCommand(argv=tuple(argv), variables=variables, port=port, files=files)


def node_commands(config: Config, *, config_path: Path, gpus: Sequence[int]) -> list[tuple[str, LaunchCommand]]:
    """Where to run what: one command on this machine, or with no_ssh one on each machine."""
    if config.launcher.kind is not LauncherKind.no_ssh:
        return [("this machine", launch_command(config, config_path=config_path, gpus=gpus))]
    return [
        (f"machine {index}", launch_command(config, config_path=config_path, gpus=gpus, node_rank=index))
        for index in range(config.hardware.nodes)
    ]


def _variables(config: Config) -> dict[str, str]:
    hardware = config.hardware
    variables = {
        "OMP_NUM_THREADS": str(hardware.threads_per_rank or 1),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH", "")])),
    }
    if hardware.accelerator is Accelerator.cpu:
        variables["DS_ACCELERATOR"] = "cpu"
    if config.launcher.kind is not LauncherKind.local and "RLHF_CACHE" in os.environ:
        variables["RLHF_CACHE"] = os.path.abspath(os.path.expanduser(os.environ["RLHF_CACHE"]))
    return variables | config.launcher.environment


def _several_machines(config: Config, hosts: Mapping[str, Sequence[int]], address: str) -> list[str]:
    launcher = config.launcher
    argv = ["--launcher", launcher.kind.name, "--master_addr", address, "--no_ssh_check"]
    if launcher.kind is LauncherKind.pdsh:
        argv.append("--force_multi")
    if launcher.ssh_port is not None:
        argv += ["--ssh_port", str(launcher.ssh_port)]
    if launcher.options:
        # As one word: the launcher would take a text that begins with a dash for an option of its own.
        argv.append(f"--launcher_args={launcher.options}")
    uneven = any(list(slots) != list(range(len(slots))) for slots in hosts.values())
    if uneven and launcher.kind is LauncherKind.pdsh:
        argv += ["--include", "@".join(f"{name}:{','.join(map(str, slots))}" for name, slots in hosts.items())]
    return argv


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
