"""Training over several machines, as a user starts it: pdsh with real ssh servers, and machines without ssh.

For launchers that need a cluster: the commands, and what DeepSpeed makes of them.
"""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from ssh import MACHINES, MISSING, Server, common_port, ssh_server

from rlhf.__main__ import adopt_rank
from rlhf.config.schema import Accelerator, Config, HardwareConfig, LauncherConfig, LauncherKind, Mode, ModelConfig
from rlhf.launcher import process
from rlhf.launcher.command import PROJECT, LaunchCommand, launch_command
from rlhf.launcher.hosts import launcher_problems, parse_hostfile
from rlhf.launcher.watchdog import start_time
from rlhf.stages.sft.config import SFTConfig

pytestmark = pytest.mark.processes

SECRETS = {
    "WANDB_API_KEY": "0a1b2c3d4e5f60718293",
    "HF_TOKEN": "hf_nobodymayreadthis",
    "MLFLOW_TRACKING_TOKEN": "ml_norreadthis",  # DeepSpeed itself would show it.
}
WORDS = ["film", "story", "plot", "cast", "scene", "music", "hero", "end", "joke", "shot"]
SETTINGS = (
    *("stage=sft", "model=tiny", "hardware=cpu", "hardware.threads_per_rank=1", "reuse=off"),
    *("memory=zero1", "memory.precision=fp32", "data=files", "data.split.held_out=0.2"),
    *("data.max_prompt_length=64", "data.max_response_length=32", "model.scratch.vocab_size=320"),
    *("model.scratch.hidden_size=32", "model.scratch.num_layers=2", "model.scratch.num_heads=2"),
    *("model.scratch.intermediate_size=64", "stage.batch_size=8", "stage.micro_batch_size_per_gpu=2"),
)
THREE_STEPS, ENDLESS = "stage.max_steps=3", ("stage.epochs=100000", "stage.max_steps=1000000")
TWO_MACHINES = ("hardware.nodes=2", "hardware.gpus_per_node=1")


@dataclass
class Launch:
    """A launch.py that runs or has run."""

    run_dir: Path
    process: "subprocess.Popen[str]"
    log: Path
    started: float

    @property
    def output(self) -> str:
        return self.log.read_text()


@dataclass
class Finished:
    """A run that has finished, and the command lines of all processes while its ranks ran."""

    run_dir: Path
    command_lines: str

    @property
    def weights(self) -> bytes:
        return (self.run_dir / "model" / "model.safetensors").read_bytes()


def environment_of(folder: Path) -> dict[str, str]:
    """A user's environment with secrets in it."""
    environment = os.environ | SECRETS
    if environment.pop("PYTHONDONTWRITEBYTECODE", None):
        # Without a cache of bytecode each of the many processes compiles torch and DeepSpeed anew.
        environment["PYTHONPYCACHEPREFIX"] = str(folder / "bytecode")
    return environment


def launch(folder: Path, name: str, *arguments: str, environment: dict[str, str] | None = None) -> Launch:
    """Start launch.py on the folder's data with a run directory of that name; everything it says goes to a file."""
    run_dir = folder / name
    log = folder / f"{name}-{len(list(folder.glob('*.log')))}.log"
    given = (*SETTINGS, f"data.sources.main.path={folder / 'pairs.jsonl'}", f"run_dir={run_dir}", *arguments)
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, str(PROJECT / "launch.py"), *given],
            env=environment_of(folder) | (environment or {}),
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
    return Launch(run_dir, process, log, time.monotonic())


def over_ssh(folder: Path, name: str, server: Server, *arguments: str) -> Launch:
    """Start a run on both machines through pdsh."""
    options = (f"launcher.hostfile={folder / 'hosts'}", f"launcher.ssh_port={server.port}")
    given = ("launcher=pdsh", *TWO_MACHINES, *options, f"launcher.master_addr={MACHINES[0]}", *arguments)
    return launch(folder, name, *given, environment=server.environment)


def without_ssh(folder: Path, name: str, *arguments: str) -> tuple[Launch, Launch]:
    """Start a run as two machines that share a run directory, one launch.py on each."""
    port = common_port(("127.0.0.1",))
    options = ("launcher=no_ssh", *TWO_MACHINES, "launcher.master_addr=127.0.0.1", f"launcher.master_port={port}")
    first, second = (launch(folder, name, *options, f"launcher.node_rank={node}", *arguments) for node in (0, 1))
    return first, second


def living() -> Iterator[Path]:
    """The folders in /proc of all processes that have not ended."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and start_time(int(entry.name)) is not None:
            yield entry


def command_lines() -> dict[int, str]:
    """The command lines of all processes by pid."""
    found = {}
    for entry in living():
        try:
            found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
    return found


def ranks(run_dir: Path) -> dict[int, int]:
    """The pids of a run's ranks by rank, on whatever machine."""
    found = {}
    for pid, line in command_lines().items():
        if line.rstrip().endswith(f"-m rlhf --config {run_dir / 'config.yaml'}"):
            try:
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            found |= {int(entry[5:]): pid for entry in variables if entry.startswith(b"RANK=")}
    return found


def of_run(run_dir: Path) -> list[str]:
    """The command lines that name a run's configuration: ranks and launchers of all machines."""
    return [line for line in command_lines().values() if str(run_dir / "config.yaml") in line]


def await_steps(launched: Launch) -> dict[int, int]:
    """Wait until a run trains; return its ranks."""
    while not (launched.run_dir / "progress.jsonl").exists() or len(ranks(launched.run_dir)) < 2:
        assert launched.process.poll() is None, launched.output
        assert time.monotonic() - launched.started < 120, launched.output
        time.sleep(0.1)
    return ranks(launched.run_dir)


def finish(runs: dict[str, tuple[Launch, ...]]) -> dict[str, Finished]:
    """Wait for all launches of some runs; look at the command lines once for each, when its ranks run."""
    seen: dict[str, str] = {}
    launches = [each for launched in runs.values() for each in launched]
    while any(each.process.poll() is None for each in launches):
        assert time.monotonic() - launches[0].started < 200, [each.output for each in launches]
        for name, (first, *_) in runs.items():
            if name not in seen and len(ranks(first.run_dir)) == 2:
                seen[name] = "\n".join(command_lines().values())
        time.sleep(0.2)
    for each in launches:
        assert each.process.returncode == 0, each.output
    return {name: Finished(first.run_dir, seen[name]) for name, (first, *_) in runs.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of all runs here, and where they are written."""
    path = tmp_path_factory.mktemp("nodes")
    rows = [
        {"prompt": f"The {one} and the {two}?", "chosen": f"The {one} was good.", "rejected": f"The {two} was bad."}
        for one in WORDS
        for two in WORDS
    ]
    (path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "hosts").write_text("".join(f"{machine} slots=1\n" for machine in MACHINES))
    return path


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """Both machines' ssh server."""
    if MISSING:
        pytest.skip(f"needs the Debian packages {', '.join(MISSING)}")
    (folder / "ssh").mkdir()
    with ssh_server(folder / "ssh") as running:
        yield running


@pytest.fixture(scope="module")
def finished(folder: Path, request: pytest.FixtureRequest) -> dict[str, Finished]:
    """The same training by two ranks of one machine, and by one rank on each of two machines."""
    one = finish({"one": (launch(folder, "one", "hardware.gpus_per_node=2", THREE_STEPS),)})
    others = {"no_ssh": without_ssh(folder, "no_ssh", THREE_STEPS)}
    if not MISSING:
        return one | finish(
            others | {"pdsh": (over_ssh(folder, "pdsh", request.getfixturevalue("server"), THREE_STEPS),)}
        )
    return one | finish(others)


def test_machines_that_start_by_themselves_train_the_same_model(finished: dict[str, Finished]) -> None:
    assert finished["no_ssh"].weights == finished["one"].weights
    written = {path.name for path in finished["no_ssh"].run_dir.iterdir()}
    assert written >= {"report.html", "hostfile", "hostfile-1", "command.txt", "command-1.txt"}


@pytest.mark.usefixtures("server")
def test_machines_reached_by_ssh_train_the_same_model(finished: dict[str, Finished]) -> None:
    run = finished["pdsh"]
    assert run.weights == finished["one"].weights
    assert (run.run_dir / "hostfile").read_text() == "127.0.0.2 slots=1\n127.0.0.3 slots=1\n"
    assert "pdsh -S" in run.command_lines
    log = (run.run_dir / "logs" / "launcher.log").read_text()
    assert all(f"\n{machine}: " in log for machine in MACHINES)  # So pdsh marks what a machine has printed.


def test_secrets_are_neither_in_files_nor_on_command_lines(finished: dict[str, Finished]) -> None:
    for name, run in finished.items():
        assert f"-m rlhf --config {run.run_dir}" in run.command_lines
        texts = {path: path.read_bytes() for path in run.run_dir.rglob("*") if path.is_file()}
        assert (run.run_dir / "command.txt") in texts
        assert (run.run_dir / "environment" in texts) == (name == "pdsh")
        for secret in SECRETS.values():
            assert secret not in run.command_lines
            assert [path for path, text in texts.items() if secret.encode() in text] == []


def test_a_rank_that_dies_on_one_machine_ends_the_launch_on_the_other(folder: Path) -> None:
    first, second = without_ssh(folder, "dying", *ENDLESS)
    os.kill(await_steps(first)[1], signal.SIGKILL)
    killed = time.monotonic()
    assert first.process.wait(30) == 1, first.output
    assert second.process.wait(30) == 1, second.output
    assert time.monotonic() - killed < 30
    assert "rank 1 was killed by signal 9 (SIGKILL)" in second.output
    assert "rank 0 failed" in first.output or "launch.py on another machine has ended this run" in first.output
    assert of_run(first.run_dir) == []


def test_sigterm_ends_the_ranks_of_all_machines_and_no_other_job(folder: Path, server: Server) -> None:
    launched = over_ssh(folder, "interrupted", server, *ENDLESS)
    await_steps(launched)
    # DeepSpeed's own handler of SIGTERM would end whatever has such a command line, on all the machines.
    other = subprocess.Popen([f"{sys.executable} -u -m deepspeed.launcher.launch", "100"], executable="/bin/sleep")
    try:
        launched.process.send_signal(signal.SIGTERM)
        assert launched.process.wait(30) == 128 + signal.SIGTERM, launched.output
        assert "interrupted by SIGTERM" in launched.output
        assert of_run(launched.run_dir) == []
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (247, "a rank on b2 was killed by signal 9 (SIGKILL)"),
        (255, "machine b2 cannot be reached, or the connection broke: ssh ended with exit code 255"),
        (1, "machine b2 failed: its launcher ended with exit code 1"),
    ],
)
def test_a_machine_that_is_lost_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str
) -> None:
    monkeypatch.setattr(process, "FAILURE_GRACE", 0.3)
    monkeypatch.setattr(process, "ELSEWHERE_GRACE", 0.0)
    # What pdsh prints; it goes on waiting for the other machines.
    script = f"echo 'pdsh@a1: b2: ssh exited with exit code {code}'; exec sleep 60"
    command = LaunchCommand(argv=("bash", "-c", script), variables={}, port=29500, by_ssh=True)
    outcome = process.supervise(command, run_dir=tmp_path, ranks=2, on_poll=lambda: None)
    assert (outcome.code, outcome.message.split("\n")[0].split(";")[0]) == (1, message)
    assert (tmp_path / "stop").exists()


SCRIPT = PROJECT / "rlhf" / "__main__.py"
DEEPSPEED = Path(sys.executable).with_name("deepspeed")
VARIABLES = f"OMP_NUM_THREADS=8 TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_TELEMETRY=1 PYTHONPATH={PROJECT} MY_OWN=a:1"
# Per launcher: a user's options, what `deepspeed` is given beside hostfile and --config, and the command it makes.
GOLDEN = {
    LauncherKind.slurm: (
        "--mem=0",
        "--launcher slurm --master_addr a1 --no_ssh_check --force_multi --include a1@b2 "
        "'--launcher_args=--ntasks-per-node=2 --kill-on-bad-exit=1 --mem=0' "
        f"--no_local_rank --master_port 29500 {SCRIPT}",
        "srun -n 4 --ntasks-per-node=2 --kill-on-bad-exit=1 --mem=0 --nodelist a1,b2 --nodes 2 --export=ALL,{comma} "
        f"{sys.executable} -u {SCRIPT}",
    ),
    LauncherKind.openmpi: (
        "--bind-to none",
        "--launcher openmpi --master_addr a1 --no_ssh_check --force_multi '--launcher_args=--bind-to none' "
        "--no_local_rank --master_port 29500 --module rlhf",
        "mpirun -n 4 -hostfile {folder}/hostfile --mca btl ^openib --mca btl_tcp_if_include eth0 --bind-to none "
        f"-x UCX_TLS=tcp {{x}} {sys.executable} -u -m rlhf",
    ),
    LauncherKind.mpich: (
        "-bind-to none",
        "--launcher mpich --master_addr a1 --no_ssh_check --force_multi '--launcher_args=-bind-to none' "
        f"--no_local_rank --master_port 29500 {SCRIPT}",
        "mpirun -n 4 -ppn 2 -bind-to none {genv} -genv MASTER_ADDR a1 -genv MASTER_PORT 29500 -genv WORLD_SIZE 4 "
        f"-genv LOCAL_SIZE 2 -hosts a1,b2 {sys.executable} -u {{helper}} --launcher mpich {SCRIPT}",
    ),
}


def config_for(kind: LauncherKind, hosts: Path | None, **options: object) -> Config:
    """Two machines with two of their GPUs each."""
    given = {"kind": kind, "hostfile": str(hosts) if hosts else None, "master_port": 29500, **options}
    return Config(
        stage=SFTConfig(),
        model=ModelConfig(name="tiny"),
        hardware=HardwareConfig(accelerator=Accelerator.cuda, nodes=2, gpus_per_node=2, threads_per_rank=8),
        launcher=LauncherConfig(**given),  # type: ignore[arg-type]
    )


def problems(config: Config) -> list[str]:
    """What is wrong with the launcher's options, but for programs that are not installed here."""
    return [problem for problem in launcher_problems(config) if "is not installed" not in problem]


def made_by_deepspeed(command: LaunchCommand, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command that the `deepspeed` program would run for ours, on a machine with all launchers installed."""
    from deepspeed.launcher import runner

    for path, text in command.files.items():
        path.write_text(text)
    for name in [name for name in os.environ if name.startswith(("PYTHON", "MLFLOW"))]:
        monkeypatch.delenv(name)
    for name, value in command.environment({"MLFLOW_TRACKING_TOKEN": "ml_norreadthis"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(PROJECT)
    monkeypatch.setattr(runner, "DEEPSPEED_ENVIRONMENT_NAME", command.variables.get("DS_ENV_FILE", ""))
    for launcher in runner.LAUNCHER_CLASSES.values():
        monkeypatch.setattr(launcher, "backend_exists", lambda self: True)
    made: list[list[str]] = []

    class Started:
        returncode = 0

        def __init__(self, argv: list[str], env: dict[str, str]) -> None:
            made.append(argv)

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(runner.subprocess, "Popen", Started)
    monkeypatch.setattr(runner.signal, "signal", lambda *_: None)
    assert command.argv[0] == str(DEEPSPEED)
    runner.main(list(command.argv[1:]))
    (argv,) = made
    return argv


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's hostfile with more machines and slots than are used; variables that would show in commands are unset."""
    monkeypatch.delenv("RLHF_CACHE", raising=False)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    (tmp_path / "hosts").write_text("# ours\na1 slots=4\nb2 slots=4\nc3 slots=4\n")
    return tmp_path / "hosts"


@pytest.mark.parametrize("kind", list(GOLDEN))
def test_commands_for_clusters(kind: LauncherKind, hosts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed.launcher

    folder = hosts.parent
    options, ours, deepspeeds = GOLDEN[kind]
    config = config_for(kind, hosts, options=options, environment={"MY_OWN": "a:1"})
    assert problems(config) == []
    command = launch_command(config, config_path=folder / "config.yaml", gpus=())
    given = f"{DEEPSPEED} --hostfile {folder}/hostfile {ours} --config {folder}/config.yaml"
    assert command.shell() == f"{VARIABLES} DS_ENV_FILE={folder}/environment {given}"
    # Slurm itself decides which machine is the first.
    address = ["MASTER_ADDR=a1"] if kind is not LauncherKind.slurm else []
    passed = [*VARIABLES.split(), *address, "MASTER_PORT=29500"]
    assert {path.relative_to(folder).as_posix(): text for path, text in command.files.items()} == {
        "hostfile": "a1 slots=2\nb2 slots=2\n",
        "environment": "".join(f"{line}\n" for line in passed),
    }
    argv = made_by_deepspeed(command, monkeypatch)
    # DeepSpeed finds PYTHONPATH itself, too, and then reads the file.
    passed = sorted(passed, key=lambda line: not line.startswith("PYTHONPATH"))
    expected = deepspeeds.format(
        folder=folder,
        comma=",".join(passed),
        x=" ".join(f"-x {line}" for line in passed),
        genv=" ".join(f"-genv {line}" for line in passed),
        helper=Path(deepspeed.launcher.__path__[0]).resolve() / "launcher_helper.py",
    )
    assert argv == [*expected.split(), "--config", f"{folder}/config.yaml"]


def test_the_script_that_srun_and_mpich_start_runs_anywhere(tmp_path: Path) -> None:
    import deepspeed.launcher

    helper = [str(Path(deepspeed.launcher.__path__[0], "launcher_helper.py")), "--launcher", "mpich"]
    environment = environment_of(tmp_path) | {"PYTHONPATH": str(PROJECT), "PMI_RANK": "1", "MPI_LOCALRANKID": "1"}
    for started in ([], helper):
        argv = [sys.executable, "-u", *started, str(SCRIPT), "--help"]
        done = subprocess.run(
            argv, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100, check=True
        )
        assert "usage: python -m rlhf [-h] --config CONFIG" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("nodes", "first"), [("b2", "b2"), ("a1,b2", "a1"), ("node[07-09,12],other", "node07"), ("n[2,4]-ib", "n2-ib")]
)
def test_ranks_under_slurm_meet_on_its_first_machine(nodes: str, first: str) -> None:
    environment = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": nodes}
    adopt_rank(environment)
    assert {name: environment[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")} == {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": first,
    }
    environment["MASTER_ADDR"] = "given"
    adopt_rank(environment)
    assert environment["MASTER_ADDR"] == "given"


@pytest.mark.parametrize("kind", [LauncherKind.pdsh, LauncherKind.no_ssh])
def test_chosen_gpus_reach_the_machines(kind: LauncherKind, hosts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_for(kind, hosts, include="b2:1,3@c3", node_rank=1, master_addr="b2")
    command = launch_command(config, config_path=hosts.parent / "config.yaml", gpus=(), node_rank=1)
    assert worlds(made_by_deepspeed(command, monkeypatch)) == {"b2": [1, 3], "c3": [0, 1]}


def test_machines_that_start_by_themselves_take_their_visible_gpus(
    hosts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(LauncherKind.no_ssh, None, node_rank=1, master_addr="10.0.0.1")
    command = launch_command(config, config_path=hosts.parent / "config.yaml", gpus=(2, 5, 6), node_rank=1)
    assert worlds(made_by_deepspeed(command, monkeypatch)) == {"node0": [0, 1], "node1": [2, 5]}


def worlds(argv: list[str]) -> dict[str, list[int]]:
    """The machines and GPUs in a command of DeepSpeed's launcher."""
    (encoded,) = [word.partition("=")[2] for word in argv if word.startswith("--world_info=")]
    decoded: dict[str, list[int]] = json.loads(base64.urlsafe_b64decode(encoded))
    return decoded


@pytest.mark.parametrize(
    ("kind", "options", "problem"),
    [
        (
            LauncherKind.slurm,
            {"include": "a1:2,3@b2"},
            "launcher.include=a1:2,3@b2: launcher=slurm can choose machines, but",
        ),
        (LauncherKind.openmpi, {"exclude": "a1:0"}, "launcher.exclude=a1:0: launcher=openmpi can choose machines, but"),
        (LauncherKind.no_ssh, {"hostfile": "/nowhere"}, "launcher.hostfile=/nowhere: cannot be read"),
        (
            LauncherKind.pdsh,
            {"hostfile": "/dev/zero"},
            "launcher.hostfile=/dev/zero: cannot be read: is a device, not a regular file",
        ),
        (LauncherKind.pdsh, {"hostfile": "/tmp"}, "launcher.hostfile=/tmp: cannot be read: is a directory, not a"),
        (LauncherKind.pdsh, {"environment": {"A": "$HOME"}}, "launcher.environment.A=$HOME: launcher=pdsh cannot pass"),
        (LauncherKind.mpich, {"environment": {"A": "1 2"}}, "launcher.environment.A=1 2: launcher=mpich cannot pass"),
        (LauncherKind.slurm, {"environment": {"A": "1\n2"}}, "launcher.environment.A=1\n2: launcher=slurm cannot pass"),
        (
            LauncherKind.local,
            {"environment": {"A": "\x1bc"}},
            "launcher.environment.A=\x1bc: launcher=local cannot pass",
        ),
    ],
)
def test_what_a_launcher_cannot_do_is_a_problem(
    kind: LauncherKind, options: dict[str, object], problem: str, hosts: Path
) -> None:
    found = problems(config_for(kind, hosts, **options))
    assert [each for each in found if each.startswith(problem)], found


@pytest.mark.parametrize(
    ("name", "good"),
    [
        ("node-1", True),
        ("a", True),
        ("gpu01.cluster.example.org", True),
        ("job_worker_1", True),
        ("10.0.0.17", True),
        ("2001:db8::17", True),
        ("fe80::1%eth0", True),
        ("a" * 63 + ".b", True),
        ("-oProxyCommand=reboot", False),
        ("node1;reboot", False),
        ("$(reboot)", False),
        ("node1`id`", False),
        ("me@node1", False),
        ("node1:22", False),
        ("fe80::1%$(reboot)", False),
        ("10.0.0.300", False),
        ("10.0.0", False),
        ("node[01-04]", False),
        ("node1,node2", False),
        ("node1.", False),
        ("node1..b", False),
        ("node-", False),
        ("n\N{LATIN SMALL LETTER O WITH DIAERESIS}de", False),
        ("a" * 64, False),
        (".".join(["abcdefgh"] * 30), False),
        ("\x1b]0;x\x07", False),
    ],
)
def test_only_names_of_hosts_reach_a_shell(name: str, good: bool, tmp_path: Path) -> None:
    hosts, found = parse_hostfile(f"# ours\nfirst slots=2\n{name} slots=2\n")
    assert (list(hosts), found == []) == ((["first", name], True) if good else (["first"], False))
    assert good or found[0].startswith("line 3: ")
    (tmp_path / "hosts").write_text("a1 slots=2\nb2 slots=2\n")
    config = config_for(LauncherKind.pdsh, tmp_path / "hosts", master_addr=name)
    assert [each.startswith("launcher.master_addr: ") for each in problems(config)] == ([] if good else [True])


def test_a_hostfile_of_something_else_is_told_in_a_few_lines(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("import torch\n" * 300 + "x" * 5000 + "\na slots=" + "9" * 5000)
    (found,) = problems(config_for(LauncherKind.pdsh, tmp_path / "hosts"))
    assert found.startswith(f"launcher.hostfile={tmp_path / 'hosts'}: line 1: 'import torch' is not of the form")
    assert found.endswith("and 297 more lines") and len(found) < 1000


@pytest.mark.parametrize(("kind", "rank"), [(LauncherKind.local, None), (LauncherKind.no_ssh, 0)])
def test_a_port_in_use_is_told_before_anything_starts(kind: LauncherKind, rank: int | None) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        config = config_for(kind, None, master_port=port, master_addr="127.0.0.1", node_rank=rank)
        (found,) = problems(config)
        assert found.startswith(f"launcher.master_port={port}: another program listens there: ")
        assert problems(replace(config, mode=Mode.plan)) == []
    assert problems(config) == []


def test_a_hostfile_that_is_none_is_told_shortly(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "long").write_text("x\n" * 600_000)
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 100)
    (tmp_path / "slots").write_text(f"a1 slots={'9' * 5000}\nb2 slots=99999999999\n")
    for name, told in (
        ("pipe", "cannot be read: is a named pipe, not a regular file"),
        ("long", "cannot be read: is longer than 1048576 bytes"),
        ("binary", "is not of the form  NAME slots=N; and "),
        ("slots", "is not of the form  NAME slots=N"),
    ):
        (problem,) = [
            each
            for each in problems(config_for(LauncherKind.pdsh, tmp_path / name))
            if each.startswith("launcher.hostfile")
        ]
        assert told in problem and len(problem) < 2500
