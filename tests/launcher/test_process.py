"""The wrapper around the real DeepSpeed launcher, with ranks that end in every way that ranks can end."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from shared_memory import left_by

from rlhf.__main__ import record_error
from rlhf.config.errors import ConfigError
from rlhf.launcher.command import PROJECT
from rlhf.launcher.processes import remove_shared_memory
from rlhf.launcher.watchdog import start_time

pytestmark = pytest.mark.processes

DRIVE = Path(__file__).with_name("drive.py")


def start(run_dir: Path, behaviour: str) -> subprocess.Popen[str]:
    """Start the driver, which stands for launch.py, as a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    argv = [sys.executable, str(DRIVE), str(run_dir), behaviour]
    return subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def processes_of(run_dir: Path) -> list[int]:
    """All living processes whose command line names the run directory, but for the driver and its zombies."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid() and start_time(int(entry.name)) is not None:
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(run_dir).encode() in line:
                found.append(int(entry.name))
    return found


def rank_pids(run_dir: Path) -> list[tuple[int, int]]:
    """Pid and parent's pid of both ranks, as soon as both run."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        files = [run_dir / "pid0", run_dir / "pid1"]
        texts = [file.read_text() for file in files if file.exists()]
        if len(texts) == 2 and all(" " in text for text in texts):
            return [(int(text.split()[0]), int(text.split()[1])) for text in texts]
        time.sleep(0.1)
    raise AssertionError(f"the ranks did not start: {(run_dir / 'logs' / 'launcher.log').read_text()}")


@pytest.fixture
def shared_memory(tmp_path: Path) -> Iterator[None]:
    """Fail if the run leaves anything in shared memory."""
    yield
    assert left_by(tmp_path) == []


@pytest.mark.parametrize(
    ("behaviour", "code", "message"),
    [
        ("finish", 0, ""),
        ("raise", 1, "the loss is a pumpkin"),
        ("user-error", 2, "reviews.jsonl:7: no key 'prompt'"),
        ("killed", 1, "rank 1 was killed by signal 9 (SIGKILL)"),
    ],
)
@pytest.mark.usefixtures("shared_memory")
def test_ranks_that_end_by_themselves(tmp_path: Path, behaviour: str, code: int, message: str) -> None:
    started = time.monotonic()
    driver = start(tmp_path, behaviour)
    output, _ = driver.communicate(timeout=120)
    assert driver.returncode == code, output
    assert message in output
    assert ("Traceback" in output) == (behaviour == "raise")
    assert processes_of(tmp_path) == []
    if code:
        failed_at = max(path.stat().st_mtime for path in [*tmp_path.glob("errors/*"), *tmp_path.glob("pid?")])
        assert time.time() - failed_at < 30
    assert time.monotonic() - started < 120


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.usefixtures("shared_memory")
def test_a_signal_to_the_wrapper_leaves_no_process(tmp_path: Path, signum: signal.Signals) -> None:
    driver = start(tmp_path, "deaf" if signum is signal.SIGTERM else "sleep")
    rank_pids(tmp_path)
    driver.send_signal(signum)
    output, _ = driver.communicate(timeout=60)
    assert driver.returncode == 128 + signum
    assert f"interrupted by {signum.name}" in output
    assert processes_of(tmp_path) == []


def test_killing_the_per_node_launcher_is_a_failure_and_leaves_no_orphans(tmp_path: Path) -> None:
    driver = start(tmp_path, "sleep")
    (_, per_node), _ = rank_pids(tmp_path)
    os.kill(per_node, signal.SIGKILL)
    output, _ = driver.communicate(timeout=30)
    assert driver.returncode == 1
    assert "ended before the ranks had finished" in output
    assert processes_of(tmp_path) == []


def test_killing_the_wrapper_ends_the_ranks(tmp_path: Path) -> None:
    driver = start(tmp_path, "sleep")
    rank_pids(tmp_path)
    driver.kill()
    driver.wait()
    deadline = time.monotonic() + 20
    while processes_of(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert processes_of(tmp_path) == []


def test_a_run_directory_that_is_removed_ends_the_run_with_one_line(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    driver = start(run_dir, "sleep")
    rank_pids(run_dir)
    shutil.rmtree(run_dir)
    output, _ = driver.communicate(timeout=60)
    assert (driver.returncode, output) == (
        1,
        f"{run_dir} was removed while its stage was training: all ranks have ended\n",
    )
    assert processes_of(run_dir) == []


def test_only_the_runs_own_shared_memory_is_deleted(tmp_path: Path) -> None:
    names = ["deepspeed_allreduce_buffer_0_127.0.0.1_29501_0", "deepspeed_allreduce_buffer_0_127.0.0.1_29502_0"]
    names += ["torch_17_33_0", "torch_18_33_0", "nccl-abc"]
    for name in names:
        (tmp_path / name).touch()
    remove_shared_memory(port=29501, pids={17}, folder=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {names[1], "torch_18_33_0", "nccl-abc"}


def test_a_rank_that_launch_py_did_not_start_ends_when_it_is_told_to(tmp_path: Path) -> None:
    script = (
        "import pathlib, sys, time; from rlhf.launcher.watchdog import start_watchdog;"
        "start_watchdog(pathlib.Path(sys.argv[1]), {}); print('watching', flush=True); time.sleep(60)"
    )
    argv = [sys.executable, "-c", script, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    rank = subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, start_new_session=True)
    assert rank.stdout is not None and rank.stdout.readline() == b"watching\n"
    assert rank.poll() is None
    (tmp_path / "stop").touch()
    assert rank.wait(timeout=20) == -signal.SIGKILL


def test_a_rank_that_fails_after_its_model_is_written_says_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "errors" / "rank0.json"
    full = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "samples.jsonl"))
    record_error(path, full)
    facts = json.loads(path.read_text())
    assert facts["user_error"] and facts["message"].endswith("no model has been written")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for error in (full, ValueError("odd")):
        record_error(path, error)
        assert json.loads(path.read_text())["message"].endswith(f"the trained model is in {tmp_path / 'model'}")
    record_error(path, ConfigError("a mistake"))
    assert json.loads(path.read_text())["message"] == "a mistake"
