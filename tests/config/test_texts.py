"""Options that are texts: line breaks on the command line, and chat templates in files."""

from dataclasses import replace
from pathlib import Path

import pytest

from rlhf.config.errors import ConfigError
from rlhf.config.escapes import read_escapes
from rlhf.config.origins import COMMAND_LINE
from rlhf.config.schema import Config, DataConfig, ModelConfig, RolloutConfig, SourceConfig
from rlhf.config.templates import chat_template_text, template_problems, with_templates


def given(origin: str) -> Config:
    sources = {"main": SourceConfig(markers=["\\nA:", "\\nB:"], remove="\\n+")}
    stop = ["\\n\\n", "\\\\n", "\\alpha\\t"]
    config = Config(rollout=RolloutConfig(stop=stop), data=DataConfig(sources=sources))
    read_escapes(config, {"rollout.stop": origin, "data.sources.main": origin})
    return config


def test_escapes_are_read_on_the_command_line_only() -> None:
    changed = given(COMMAND_LINE)
    assert changed.rollout.stop == ["\n\n", "\\n", "\\alpha\t"]
    assert changed.data.sources["main"].markers == ["\nA:", "\nB:"]
    assert changed.data.sources["main"].remove == "\\n+"  # A regular expression reads it itself.
    assert given("conf/experiment/x.yaml").rollout.stop == ["\\n\\n", "\\\\n", "\\alpha\\t"]


def test_a_file_stands_for_the_template_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("chat.jinja").write_bytes(b"\xef\xbb\xbf{{ messages[0]['content'] }}\r\n")
    model = ModelConfig(chat_template="chat.jinja")
    config = with_templates(Config(model=model, reward_model=model))
    assert config.model.chat_template == "{{ messages[0]['content'] }}\n"
    assert config.reward_model == config.model
    assert with_templates(config) == config  # Text is text.
    assert chat_template_text("") is chat_template_text(None) is None


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("gone", "no such file"),
        ("rows.jsonl", "no Jinja template"),
        ("bytes", "not UTF-8"),
        ("/dev/zero", "no such file"),
    ],
)
def test_files_that_hold_no_template_are_problems(
    value: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"a": 1}')
    Path("bytes").write_bytes(b"\xff{{")
    with pytest.raises(ConfigError, match=f"model.chat_template={value}: .*{reason}"):
        chat_template_text(value)
    bad = replace(Config(), model=ModelConfig(chat_template=value))
    assert len(list(template_problems(bad))) == 1 and with_templates(bad) == bad
