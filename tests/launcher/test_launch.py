"""The command line of launch.py: what it says, with which exit code, and what it does not write."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.launcher.command import PROJECT

SECRET = "0123456789abcdef"


def launch(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run launch.py in a folder."""
    environment = os.environ | {"RLHF_CACHE": str(folder / "cache"), "WANDB_API_KEY": SECRET}
    argv = [sys.executable, str(PROJECT / "launch.py"), *arguments]
    return subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_a_plan_shows_commands_and_writes_nothing(tmp_path: Path) -> None:
    done = launch(tmp_path, "mode=plan", "hardware=cpu", "memory=zero3")
    assert (done.returncode, done.stderr) == (0, "")
    commands = [line for line in done.stdout.splitlines() if "--module rlhf --config" in line]
    assert len(commands) == 3
    assert all("--num_accelerators 2" in line and "DS_ACCELERATOR=cpu" in line for line in commands)
    blocks = done.stdout.split("# Stage ppo: DeepSpeed configuration of the ")[1:]
    rendered = {block.split("\n")[0]: json.loads(block.split("\n", 1)[1].split("\n# ")[0]) for block in blocks}
    assert list(rendered) == ["actor", "critic", "reference", "reward model"]
    assert rendered["actor"]["zero_optimization"]["stage"] == 3
    assert SECRET not in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_plans_every_job_and_tells_of_those_that_cannot_be(tmp_path: Path) -> None:
    done = launch(tmp_path, "-m", "seed=1,2", "stage=sft", "stage.batch_size=64,63", "mode=plan", "hardware=cpu")
    assert done.returncode == 2
    assert done.stdout.count("--module rlhf") == 2
    assert done.stderr.count("stage.batch_size=63") == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["stage=sfft"], "did you mean stage=sft?"),
        (["seed=one"], "seed: Value 'one'"),
        (["memory.zero_stage=4", "data.split.held_out=2"], "2 problems in the configuration"),
        (["data=files", "data.sources.main.path=broken.jsonl"], "broken.jsonl:2"),
        (["run_dir=."], "holds no run"),
    ],
)
def test_bad_input_is_one_message_and_nothing_is_written(tmp_path: Path, arguments: list[str], expected: str) -> None:
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": 1}\n')
    done = launch(tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"broken.jsonl", "cache"}


def test_hydra_flags_work(tmp_path: Path) -> None:
    shown = launch(tmp_path, "--cfg", "job", "seed=7")
    assert (shown.returncode, "seed: 7" in shown.stdout) == (0, True)
    usage = launch(tmp_path, "--help")
    assert (usage.returncode, "python launch.py mode=plan" in usage.stdout) == (0, True)
    assert list(tmp_path.iterdir()) == []


def test_launching_imports_no_heavy_library(tmp_path: Path) -> None:
    script = (
        "import sys; sys.argv = ['launch.py', 'mode=plan']; import launch; code = launch.main();"
        "heavy = {'torch', 'deepspeed', 'transformers', 'matplotlib', 'pandas', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy; sys.exit(code)"
    )
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
