"""The end of a run: what is said where the report cannot be written, and what a finished run's inputs decide."""

from pathlib import Path

import pytest

from rlhf.config.errors import ConfigError
from rlhf.config.files import write_config
from rlhf.config.schema import Config
from rlhf.launcher.pipeline import StageRun
from rlhf.launcher.process import Outcome
from rlhf.stages.conclude import conclude
from rlhf.stages.sft.config import SFTConfig
from rlhf.stages.start import goes_on


@pytest.fixture
def trained(tmp_path: Path) -> StageRun:
    """A run of one stage that has written its model."""
    run = StageRun(config=Config(stage=SFTConfig(), run_dir=str(tmp_path)), directory=tmp_path)
    write_config(run.config, tmp_path / "config.yaml")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return run


def test_a_report_that_cannot_be_written_is_one_line_and_the_model_is_named(
    trained: StageRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = trained.directory
    (run_dir / "report.md").mkdir()
    outcome = conclude([trained], run_dir, Outcome(0))
    said = capsys.readouterr()
    assert outcome.code == 1
    assert said.err.startswith("launch.py: the report could not be written: IsADirectoryError")
    assert said.err.count("\n") == 1 and str(run_dir) in said.err and "the same command writes it" in said.err
    assert f"model:  {run_dir / 'model'}\n" in said.out
    (run_dir / "report.md").rmdir()
    assert conclude([trained], run_dir, Outcome(0)).code == 0
    assert f"report: {run_dir / 'report.html'}\n" in capsys.readouterr().out
    failed = Outcome(2, "reviews.jsonl:7: no key 'prompt'")
    assert conclude([trained], run_dir, failed) is failed


def test_a_removed_run_gets_no_report(tmp_path: Path) -> None:
    run = StageRun(config=Config(stage=SFTConfig()), directory=tmp_path / "gone")
    failed = Outcome(1, "removed")
    assert conclude([run], run.directory, failed) is failed
    assert not run.directory.exists()


def test_a_finished_run_says_what_changed_since(trained: StageRun) -> None:
    run_dir = trained.directory
    (run_dir / "report.html").touch()
    (run_dir / "done").mkdir()
    (run_dir / "done" / "rank0").touch()
    with pytest.raises(ConfigError, match=r"has finished.*Its data changed since it finished"):
        goes_on(trained.config, [trained], run_dir, changed=["data"])
    assert goes_on(trained.config, [trained], run_dir, anew=True, changed=["data"])
