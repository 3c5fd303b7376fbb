"""vLLM in the training process: its answers are those of transformers with the weights of the moment.

Needs vLLM: `make test-vllm` installs its build for CPUs into an environment of its own.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from answering import save_policy
from ranks import run_ranks

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the policy is."""
    path = tmp_path_factory.mktemp("vllm")
    save_policy(path)
    return path


@pytest.mark.parametrize("each", [1, 2])
def test_answers_are_those_of_transformers_with_the_weights_of_the_moment(folder: Path, each: int) -> None:
    for rank in range(2 if each > 1 else 0):  # What an earlier run leaves.
        Path(f"/dev/shm/-tp:0-[0-1]-cpushm_{rank}").touch()
    run_ranks(Path(__file__).with_name("answering.py"), str(folder), str(each), ranks=2, timeout=600)
    facts: dict[str, Any] = json.loads((folder / f"vllm-{each}.json").read_text())
    assert facts["random_state_kept"] == 1.0
    assert facts["threads"] == 1.0
    for name in ("zero3_lora", "zero0", "zero3"):
        assert facts[name]["tokens"] > 10
        assert facts[name]["same"] == 1.0
        assert facts[name]["again"] == 1.0
        assert facts[name]["logprob_error"] < 1e-4
