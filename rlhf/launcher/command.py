"""The DeepSpeed launcher's command line, files and environment for one stage."""

import os
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlhf import interpreter
from rlhf.config.schema import Accelerator, Config, LauncherKind
from rlhf.launcher.hosts import SHARED_PORT, hosts_of

PROJECT = Path(interpreter.PROJECT).resolve()
# A surrounding distributed job must not leak into this one.
_FOREIGN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_SIZE")
HOSTFILE, ENVIRONMENT = "hostfile", "environment"
# Without this option DeepSpeed reads /job/hostfile, if that exists, and starts the ranks by ssh on its machines.
NO_HOSTFILE = ("--hostfile", os.devnull)
# DeepSpeed writes variables with this prefix into command lines on other machines, secrets too. Nothing here uses them.
_EXPORTED = "MLFLOW"


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchCommand:
    """What starts the ranks: argv, the variables added to the environment, the port, and files that it reads.

    `files` maps paths to contents; they are written before the launch. `local_ranks` are the ranks that run on this
    machine, or None if that cannot be told. With `by_ssh` they run in shells that no signal reaches from here.
    """

    argv: tuple[str, ...]
    variables: Mapping[str, str]
    port: int
    files: Mapping[Path, str] = field(default_factory=dict)
    local_ranks: range | None = None
    by_ssh: bool = False

    def shell(self) -> str:
        """The command as a line for a shell; it holds no secrets, which stay in the inherited environment."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.variables.items()]
        return " ".join([*variables, shlex.join(self.argv)])

    def environment(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """The ranks' environment."""
        environment = {name: value for name, value in inherited.items() if name not in _FOREIGN}
        if self.local_ranks is None:
            environment = {name: value for name, value in environment.items() if not name.startswith(_EXPORTED)}
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
    program = _program(launcher.kind)
    target = ["--no_local_rank", "--master_port", str(port), *program, "--config", str(config_path)]
    if launcher.kind is LauncherKind.local:
        on_cpu = hardware.accelerator is Accelerator.cpu
        argv = [*_launcher(), *NO_HOSTFILE, *_resources(ranks, on_cpu=on_cpu, gpus=gpus), *target]
        return LaunchCommand(argv=tuple(argv), variables=variables, port=port, local_ranks=range(ranks))
    folder = config_path.parent
    hosts = hosts_of(config) or {f"node{index}": list(range(ranks)) for index in range(hardware.nodes)}
    address = launcher.master_addr or next(iter(hosts))
    if no_ssh:
        if launcher.hostfile is None and hardware.accelerator is Accelerator.cuda and len(gpus) >= ranks:
            hosts[list(hosts)[node_rank]] = list(gpus[:ranks])
        hostfile = folder / (f"{HOSTFILE}-{node_rank}" if node_rank else HOSTFILE)
        argv = [*_launcher(), "--hostfile", str(hostfile), *_chosen_slots(hosts)]
        argv += ["--no_ssh", "--node_rank", str(node_rank), "--master_addr", address, *target]
        local = range(node_rank * ranks, (node_rank + 1) * ranks)
        files = {hostfile: _hostfile(hosts)}
        return LaunchCommand(argv=tuple(argv), variables=variables, port=port, files=files, local_ranks=local)
    # Read by the launcher and passed on to every machine.
    passed = variables | {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    if launcher.kind is LauncherKind.slurm and launcher.master_addr is None:
        del passed["MASTER_ADDR"]  # Slurm has an order of its own: ranks ask it which machine is the first.
    files = {
        folder / HOSTFILE: _hostfile(hosts),
        folder / ENVIRONMENT: "".join(f"{name}={value}\n" for name, value in passed.items()),
    }
    variables["DS_ENV_FILE"] = str(folder / ENVIRONMENT)
    argv = [*_launcher(), "--hostfile", str(folder / HOSTFILE), *_several_machines(config, hosts, address), *target]
    by_ssh = launcher.kind is LauncherKind.pdsh
    return LaunchCommand(argv=tuple(argv), variables=variables, port=port, files=files, by_ssh=by_ssh)


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


def _program(kind: LauncherKind) -> list[str]:
    """What every rank runs."""
    if kind in (LauncherKind.slurm, LauncherKind.mpich):
        # DeepSpeed's srun command leaves --module out, and the one for MPICH runs a helper's path as a module.
        return [str(PROJECT / "rlhf" / "__main__.py")]
    return ["--module", "rlhf"]


def _several_machines(config: Config, hosts: Mapping[str, Sequence[int]], address: str) -> list[str]:
    launcher = config.launcher
    # Without --force_multi the launcher would start the ranks of a single machine here, whatever that machine is.
    argv = ["--launcher", launcher.kind.name, "--master_addr", address, "--no_ssh_check", "--force_multi"]
    options = launcher.options or ""
    if launcher.kind is LauncherKind.slurm:
        # Exactly these machines of the allocation, as many ranks on each, and none that waits for one that has died.
        argv += ["--include", "@".join(hosts)]
        options = f"--ntasks-per-node={len(next(iter(hosts.values())))} --kill-on-bad-exit=1 {options}".rstrip()
    if launcher.kind is LauncherKind.pdsh:
        argv += _chosen_slots(hosts)
    if launcher.ssh_port is not None:
        argv += ["--ssh_port", str(launcher.ssh_port)]
    if options:
        # As one word: the launcher would take a text that begins with a dash for an option of its own.
        argv.append(f"--launcher_args={options}")
    return argv


def _hostfile(hosts: Mapping[str, Sequence[int]]) -> str:
    """The launcher's hostfile; it counts a machine's slots up to the last one that is used."""
    return "".join(f"{name} slots={max(slots) + 1}\n" for name, slots in hosts.items())


def _chosen_slots(hosts: Mapping[str, Sequence[int]]) -> list[str]:
    if all(list(slots) == list(range(len(slots))) for slots in hosts.values()):
        return []
    return ["--include", "@".join(f"{name}:{','.join(map(str, slots))}" for name, slots in hosts.items())]


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
