"""The machines of a run: reading a hostfile, choosing from it, and what is wrong with the launcher's options."""

import errno
import ipaddress
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from rlhf.config.explain import did_you_mean
from rlhf.config.regular import read_small_text
from rlhf.config.schema import Config, LauncherConfig, LauncherKind, Mode
from rlhf.config.secrets import names_secret, without_secrets

# The program that a kind of launcher runs, and the Debian package that has it.
PROGRAMS = {
    LauncherKind.pdsh: ("pdsh", "pdsh"),
    LauncherKind.openmpi: ("ompi_info", "openmpi-bin"),
    LauncherKind.mpich: ("mpirun", "mpich"),
    LauncherKind.slurm: ("sinfo", "slurm-client"),
}
# Values that pdsh's remote shell leaves as they are, and those that mpirun gets without DeepSpeed's quotes around them.
_FIT = {
    LauncherKind.pdsh: r'[^"$`\\\n]*',
    LauncherKind.openmpi: r"[\w@%+=:,./-]*",
    LauncherKind.mpich: r"[\w@%+=:,./-]*",
}
# Several machines that start by themselves cannot ask one of them for a free port.
SHARED_PORT = 29500
# A name of RFC 1123, and with the underscore that containers' names have; never one that a program takes for an option.
_HOST_NAME = re.compile(r"(?=.{1,253}\Z)\w([\w-]{0,61}\w)?(\.\w([\w-]{0,61}\w)?)*", re.ASCII)
_IPV6_CHARACTERS = re.compile(r"[0-9A-Fa-f:.]+(%[\w.-]+)?", re.ASCII)  # Python would take anything for a zone.
_TOLD = 5  # Lines of a hostfile.
# Bytes: ten thousand machines have lines of a hundred.
LARGEST_HOSTFILE = 1024**2
_CHOOSING = (LauncherKind.pdsh, LauncherKind.no_ssh)


def shortened(text: str, length: int = 60) -> str:
    """The text, cut where it would fill the screen."""
    return text if len(text) <= length else f"{text[:length]}…"


def host_problem(name: str) -> str | None:
    """What is wrong with the name of a machine, which will stand in command lines of shells; None for a good one."""
    short = repr(shortened(name))
    if ":" in name:
        good = _IPV6_CHARACTERS.fullmatch(name) and _is_address(name)
        return None if good else f"{short} is neither a host name nor an address: a port is given as launcher.ssh_port"
    if "@" in name:
        return f"{short} is not a host name: say in ~/.ssh/config as which user ssh logs in"
    if re.fullmatch(r"[0-9.]+", name):
        return None if _is_address(name) else f"{short} is no IPv4 address"
    if _HOST_NAME.fullmatch(name) is None:
        return f"{short} is not a host name: one has letters, digits, '-' and '.', and begins with a letter or digit"
    return None


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def parse_hostfile(text: str) -> tuple[dict[str, int], list[str]]:
    """Read lines `NAME slots=N`; blank lines and comments do not count. Return the slots by name, and the problems."""
    hosts: dict[str, int] = {}
    problems = []
    for number, line in enumerate(text.splitlines(), start=1):
        content = line.split("#")[0].strip()
        if not content:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=([0-9]{1,6})", content)
        if match is None:
            problems.append(f"line {number}: {shortened(content)!r} is not of the form  NAME slots=N")
        elif (wrong := host_problem(match[1])) is not None:
            problems.append(f"line {number}: {wrong}")
        elif match[1] in hosts:
            problems.append(f"line {number}: {match[1]} is listed twice")
        else:
            hosts[match[1]] = int(match[2])
    return hosts, problems


def select_hosts(hosts: dict[str, int], *, include: str | None, exclude: str | None) -> dict[str, list[int]]:
    """The slots that are left by `include` or `exclude` (`node1@node2:0,2`), by host, in the hostfile's order.

    Raises ValueError with the reason for a host or slot that there is not.
    """
    available = {name: list(range(slots)) for name, slots in hosts.items()}
    if not include and not exclude:
        return available
    named: dict[str, list[int]] = {}
    for part in (include or exclude or "").split("@"):
        name, _, listed = part.partition(":")
        if name not in available:
            raise ValueError(f"the hostfile has no machine {name}{did_you_mean(name, available)}")
        slots = listed.split(",") if listed else [str(slot) for slot in available[name]]
        for slot in slots:
            if not slot.isdigit() or int(slot) not in available[name]:
                raise ValueError(f"{name} has no slot {slot}: its slots are 0 to {len(available[name]) - 1}")
        named.setdefault(name, []).extend(int(slot) for slot in slots)
    if include:
        return {name: sorted(set(named[name])) for name in available if name in named}
    left = {name: [slot for slot in slots if slot not in named.get(name, [])] for name, slots in available.items()}
    return {name: slots for name, slots in left.items() if slots}


def launcher_problems(config: Config) -> Iterator[str]:
    """Yield what is wrong with the launcher's options for a resolved configuration."""
    launcher, nodes = config.launcher, config.hardware.nodes
    for name, value in launcher.environment.items():
        if names_secret(name):
            yield (
                f"launcher.environment.{name}: what looks like a secret would appear in command lines and files: put "
                "it into ~/.netrc, the hub's token file or the machines' own environment"
            )
        elif not name.isidentifier():
            yield f"launcher.environment.{name}: is not a name of an environment variable"
        elif re.fullmatch(_FIT.get(launcher.kind, ".*"), value) is None or re.search(r"[\x00-\x1f\x7f]", value):
            yield f"launcher.environment.{name}={value}: launcher={launcher.kind.name} cannot pass on such characters"
    if launcher.options and without_secrets(launcher.options) != launcher.options:
        yield (
            f"launcher.options={without_secrets(launcher.options)}: what looks like a secret would appear in command "
            "lines and files: put it into the machines' own environment"
        )
    if launcher.master_addr is not None and (wrong := host_problem(launcher.master_addr)) is not None:
        yield f"launcher.master_addr: {wrong}"
    if config.mode is Mode.run:
        yield from _port_problems(launcher)
    if launcher.include and launcher.exclude:
        yield f"launcher.include={launcher.include}: give either include or exclude, not both"
    if launcher.kind is LauncherKind.local:
        if launcher.hostfile is not None:
            yield (
                f"launcher.hostfile={launcher.hostfile}: launcher=local uses this machine only: "
                "add launcher=pdsh, or leave the hostfile out"
            )
        if launcher.include or launcher.exclude:
            yield "launcher.include and launcher.exclude need a hostfile: with launcher=local set CUDA_VISIBLE_DEVICES"
    elif launcher.kind is LauncherKind.no_ssh:
        yield from _no_ssh_problems(launcher, nodes, running=config.mode is Mode.run)
        if launcher.hostfile or launcher.include or launcher.exclude:
            yield from _hostfile_problems(config)
    else:
        yield from _hostfile_problems(config)
        program, package = PROGRAMS[launcher.kind]
        if config.mode is Mode.run and shutil.which(program) is None:
            yield (
                f"launcher.kind={launcher.kind.name}: the program {program} is not installed: "
                f"install it (Debian: apt-get install {package}), or use launcher=no_ssh; mode=plan works here"
            )


def _port_problems(launcher: LauncherConfig) -> Iterator[str]:
    """Yield why this machine's rank 0 could not listen; where another machine has rank 0, nothing can be known."""
    local = launcher.kind is LauncherKind.local
    port = launcher.master_port or (None if local else SHARED_PORT)
    if (
        port is None
        or not 0 < port < 1 << 16
        or not (local or (launcher.kind is LauncherKind.no_ssh and launcher.node_rank == 0))
    ):
        return
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1" if local else "", port))
            listener.listen()
        except OSError as error:
            why = "another program listens there" if error.errno == errno.EADDRINUSE else error.strerror
            way_out = "leave it out, and a free port is taken" if local else "give all machines another one"
            yield f"launcher.master_port={port}: {why}: {way_out}"


def _no_ssh_problems(launcher: LauncherConfig, nodes: int, *, running: bool) -> Iterator[str]:
    rank = launcher.node_rank
    if rank is not None and not 0 <= rank < nodes:
        yield f"launcher.node_rank={rank}: must be 0 to {nodes - 1} for hardware.nodes={nodes}"
    if running and rank is None:
        yield "launcher.node_rank is not set: launcher=no_ssh starts this machine's ranks, so give its number, from 0"
    if running and launcher.master_addr is None:
        yield "launcher.master_addr is not set: give the first machine's address, as in  launcher.master_addr=10.0.0.1"


def _hostfile_problems(config: Config) -> Iterator[str]:
    launcher, hardware = config.launcher, config.hardware
    if launcher.hostfile is None:
        if config.mode is Mode.run:
            yield (
                f"launcher.hostfile is not set: launcher={launcher.kind.name} reads the machines from a file with a "
                f"line  NAME slots={hardware.gpus_per_node}  for each, as in  launcher.hostfile=hosts.txt"
            )
        return
    path = Path(launcher.hostfile)
    key = f"launcher.hostfile={launcher.hostfile}"
    try:
        hosts, problems = parse_hostfile(read_small_text(path, at_most=LARGEST_HOSTFILE))
    except OSError as error:
        yield f"{key}: cannot be read: {error.strerror}"
        return
    if problems:
        more = f"; and {len(problems) - _TOLD} more lines" if len(problems) > _TOLD else ""
        yield f"{key}: {'; '.join(problems[:_TOLD])}{more}"
        return
    if not hosts:
        yield f"{key}: lists no machine: it needs a line  NAME slots={hardware.gpus_per_node}  for each"
        return
    try:
        chosen = select_hosts(hosts, include=launcher.include, exclude=launcher.exclude)
    except ValueError as error:
        option = "include" if launcher.include else "exclude"
        yield f"launcher.{option}={getattr(launcher, option)}: {error}"
        return
    per_node = hardware.gpus_per_node or 1
    if len(chosen) < hardware.nodes:
        yield f"{key}: has {len(chosen)} machines to use, fewer than hardware.nodes={hardware.nodes}"
    short = [f"{name} {len(slots)}" for name, slots in list(chosen.items())[: hardware.nodes] if len(slots) < per_node]
    if short:
        yield f"{key}: too few slots for hardware.gpus_per_node={per_node}: {', '.join(short)}"
    used = [slots[:per_node] for slots in list(chosen.values())[: hardware.nodes]]
    if launcher.kind not in _CHOOSING and not short and any(slots != list(range(per_node)) for slots in used):
        option = "include" if launcher.include else "exclude"
        yield (
            f"launcher.{option}={getattr(launcher, option)}: launcher={launcher.kind.name} can choose machines, but "
            f"takes the first {per_node} GPUs of each"
        )


def hosts_of(config: Config) -> dict[str, list[int]] | None:
    """The machines and slots that a run uses, or None where there is no hostfile. The options must be valid."""
    launcher, hardware = config.launcher, config.hardware
    if launcher.hostfile is None:
        return None
    hosts, _ = parse_hostfile(read_small_text(Path(launcher.hostfile), at_most=LARGEST_HOSTFILE))
    chosen = select_hosts(hosts, include=launcher.include, exclude=launcher.exclude)
    per_node = hardware.gpus_per_node or 1
    return {name: slots[:per_node] for name, slots in list(chosen.items())[: hardware.nodes]}
