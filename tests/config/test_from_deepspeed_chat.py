"""docs/from_deepspeed_chat.md: its tables are those of the error messages, its commands are composed and checked.

What the rows of the tables say is composed by test_foreign.py.
"""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_compose import LAPTOP, composed

from rlhf.chat import parse_arguments
from rlhf.config.foreign import DEEPSPEED_CHAT
from rlhf.config.foreign_page import filled, table
from rlhf.config.schema import Config
from rlhf.launcher.hardware import resolve
from rlhf.stages.start import check

PAGE = (Path(__file__).parents[2] / "docs" / "from_deepspeed_chat.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """The arguments of every launch.py of the page's code blocks."""
    blocks = re.findall(r"^```\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    return [shlex.split(block.replace("\\\n", " "))[2:] for block in blocks]


def written_by_hand() -> list[str]:
    """The arguments in the second column of the tables that are not written from foreign.py."""
    rows = [line for line in PAGE.split("<!-- flags", maxsplit=1)[0].splitlines() if line.startswith("| ")]
    return [cell for row in rows for cell in re.findall(r"`([^`]*=[^`]*)`", row.split(" | ")[1])]


def planned(*overrides: str) -> Config:
    """A configuration that was checked as launch.py does."""
    config = resolve(composed(*overrides), LAPTOP)
    check(config, LAPTOP, {})
    return config


def test_the_tables_are_written_from_the_one_table() -> None:
    assert filled(PAGE) == PAGE, "make reference"
    with pytest.raises(ValueError, match="tables of"):
        filled("<!-- flags: train.py --><!-- end -->")


def test_a_table_has_every_flag_and_a_reason_where_there_is_no_option() -> None:
    for script, flags in DEEPSPEED_CHAT.items():
        rows = [line.split(" | ") for line in table(script).splitlines()[2:]]
        assert {row[0].strip("| `").split(" ")[0] for row in rows} == set(flags)
        assert all(row[1] != "none" or len(row[2]) > 10 for row in rows)
        assert "{" not in table(script)


@pytest.mark.parametrize("arguments", commands(), ids=lambda arguments: arguments[0])
def test_a_command_is_planned(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, architecture in (("sft", "OPTForCausalLM"), ("rm", "OPTForSequenceClassification")):
        directory = tmp_path / "RUN" / name / "model"
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(
            f'{{"model_type": "opt", "architectures": ["{architecture}"], "id2label": {{"0": "score"}}, '
            '"score_mean": 0.0, "score_std": 1.0, "score_weights": "not looked at for a plan"}'
        )
        save_file({"score.weight": np.zeros((1, 1), np.float32)}, directory / "model.safetensors")
    assert arguments[-1] == "mode=plan"
    config = planned(*arguments)
    assert config.hardware.gpus_per_node == 8


def test_the_commands_of_whole_runs_say_what_the_scripts_do() -> None:
    _, _, sft, rm, ppo = (resolve(composed(*words), LAPTOP) for words in commands())
    assert [role.accumulation_steps(8) for stage in (sft.stage, rm.stage) for role in stage.roles()] == [1, 1]
    assert [role.accumulation_steps(8) for role in ppo.stage.roles()] == [1] * 4
    assert ppo.lora.rank_of(stage="ppo", role="actor") == 128
    assert not ppo.lora.adapts(stage="ppo", role="critic")


def test_what_the_tables_by_hand_say_composes() -> None:
    stages = [cell for cell in written_by_hand() if "stage=" in cell]
    others = [word for cell in written_by_hand() if cell not in stages for word in cell.split()]
    assert len(stages) == 5 and len(others) > 10
    assert composed("stage=ppo", *others).stage.kl_coef == 0.1  # type: ignore[attr-defined]
    for cell in stages:
        name = cell.split("stage=")[1]
        assert composed(f"stage={name}").stage.name == name


def test_the_chat_s_flags_are_there() -> None:
    for equivalent in DEEPSPEED_CHAT["chat.py"].values():
        words = equivalent.arguments("stage").split()
        assert words[:3] == ["python", "-m", "rlhf.chat"]
        assert parse_arguments(words[3:])
