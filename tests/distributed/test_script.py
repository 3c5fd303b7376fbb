"""The script in README.md, as a user would run it: with DeepSpeed's own launcher."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parents[2]


def script() -> str:
    """The README's Python block that begins with how it is started."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    (found,) = [block for block in blocks if "my_script.py" in block]
    return str(found)


def test_the_readmes_script_trains_and_saves_a_model(folder: Path, tmp_path: Path) -> None:
    assert len(script().splitlines()) < 40
    (tmp_path / "my_script.py").write_text(script())
    command = re.match(r'"""deepspeed (.*?) my_script\.py', script())
    assert command is not None
    models = [str(folder / "policy"), str(folder / "reward")]
    done = subprocess.run(
        [sys.executable, "-m", "deepspeed.launcher.runner", *command[1].split(), "my_script.py", *models],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    before, after = (
        AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (models[0], tmp_path / "my_model")
    )
    assert any(not torch.equal(value.bfloat16(), after[name].bfloat16()) for name, value in before.items())
