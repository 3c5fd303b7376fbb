"""An ssh server of the test's own on loopback addresses that stand for machines, and what pdsh needs to reach it."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

MACHINES = ("127.0.0.2", "127.0.0.3")
SSHD = shutil.which("sshd", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))
_PROGRAMS = {"openssh-server": SSHD, "openssh-client": shutil.which("ssh"), "pdsh": shutil.which("pdsh")}
MISSING = [package for package, program in _PROGRAMS.items() if program is None]


@dataclass(frozen=True)
class Server:
    """Where the server listens on every machine, and the environment through which pdsh's ssh finds key and hosts."""

    port: int
    environment: dict[str, str]


@contextlib.contextmanager
def ssh_server(folder: Path) -> Iterator[Server]:
    """Run sshd with keys and configuration in a folder; nothing of the user or the system is read or changed."""
    port = common_port(MACHINES)
    client = write_files(folder, port)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd wants it to be there; system start makes it.
    log = (folder / "sshd.log").open("w")
    assert SSHD is not None
    server = subprocess.Popen([SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], stdout=log, stderr=log)
    try:
        await_port(server, port, folder / "sshd.log")
        yield Server(port, {"PDSH_SSH_ARGS_APPEND": f"-F {client}"})
    finally:
        end_tree(server)
        log.close()


def end_tree(server: "subprocess.Popen[bytes]") -> None:
    """End the server, the servers of its connections and whatever these have started."""
    started = psutil.Process(server.pid).children(recursive=True)
    server.terminate()
    for process in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(started, timeout=20)
    server.wait(timeout=20)


def write_files(folder: Path, port: int) -> Path:
    """Keys, known hosts and both configurations; return the client's configuration."""
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
    host_key = " ".join((folder / "host_key.pub").read_text().split()[:2])
    (folder / "known_hosts").write_text("".join(f"[{machine}]:{port} {host_key}\n" for machine in MACHINES))
    listening = [f"ListenAddress {machine}:{port}" for machine in MACHINES]
    options = ["PidFile none", "StrictModes no", "UsePAM no", "PasswordAuthentication no", "PermitRootLogin yes"]
    files = [f"HostKey {folder / 'host_key'}", f"AuthorizedKeysFile {folder / 'authorized_keys'}"]
    # Machines of one kind compute the same bits: what as_avx2.sh pretends here has to hold there, too.
    names = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")
    kind = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
    files += [f"SetEnv {' '.join(kind)}"] if kind else []
    (folder / "sshd_config").write_text("\n".join([*listening, *options, *files]) + "\n")
    client = [
        *("Host *", "BatchMode yes", "IdentitiesOnly yes", f"IdentityFile {folder / 'user_key'}"),
        *(
            "StrictHostKeyChecking yes",
            f"UserKnownHostsFile {folder / 'known_hosts'}",
            "GlobalKnownHostsFile /dev/null",
        ),
    ]
    (folder / "ssh_config").write_text("\n".join(client) + "\n")
    return folder / "ssh_config"


def common_port(machines: tuple[str, ...]) -> int:
    """A port that is free on all the machines."""
    for _ in range(50):
        with socket.socket() as first:
            first.bind((machines[0], 0))
            port = int(first.getsockname()[1])
            try:
                for machine in machines[1:]:
                    with socket.socket() as other:
                        other.bind((machine, port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")


def await_port(server: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    """Wait until the server listens on every machine."""
    deadline = time.monotonic() + 20
    for machine in MACHINES:
        while True:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            try:
                socket.create_connection((machine, port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.05)
