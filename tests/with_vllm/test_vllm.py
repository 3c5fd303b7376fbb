"""vLLM in the training process: its answers are those of transformers with the weights of the moment.

Needs vLLM: `make test-vllm` installs its build for CPUs into an environment of its own.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from answering import save_policy

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the policy is."""
    path = tmp_path_factory.mktemp("vllm")
    save_policy(path)
    return path


@pytest.mark.parametrize("each", [1, 2])
def test_answers_are_those_of_transformers_with_the_weights_of_the_moment(folder: Path, each: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--no_local_rank"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    worker = str(Path(__file__).with_name("answering.py"))
    done = subprocess.run(
        [*runner, "--master_port", str(port), worker, str(folder), str(each)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    facts: dict[str, Any] = json.loads((folder / f"vllm-{each}.json").read_text())
    assert facts["random_state_kept"] == 1.0
    assert facts["threads"] == 1.0
    for name in ("zero3_lora", "zero0", "zero3"):
        assert facts[name]["tokens"] > 10
        assert facts[name]["same"] == 1.0
        assert facts[name]["again"] == 1.0
        assert facts[name]["logprob_error"] < 1e-4
