"""What a sweep says at its end, also where it can be written nowhere."""

from pathlib import Path

import pytest

import launch
from rlhf.launcher.sweep import SWEEP, TABLE, JobResult, read_results, write_result
from rlhf.stages.summary import summarize_sweep


def result(number: int, **overrides: str) -> JobResult:
    """A job that came to a score."""
    return JobResult(
        number=number,
        overrides=overrides,
        code=0,
        run_dir=f"/runs/{number}",
        message="",
        metric="score",
        objective=0.5 + number,
    )


def test_nothing_in_the_table_steers_a_terminal(tmp_path: Path) -> None:
    for number in range(2):
        write_result(tmp_path, result(number, **{"data.name": f"\x1b]0;{number}\x07"}))
    assert read_results(tmp_path)[1].overrides == {"data.name": "\x1b]0;1\x07"}
    text, problem = summarize_sweep(tmp_path)
    assert problem == ""
    for said in (text, (tmp_path / TABLE).read_text()):
        assert "\\x1b]0;1\\x07" in said and "\x1b" not in said


def test_a_summary_that_cannot_be_written_is_told_with_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_result(tmp_path, result(0, seed="1"))
    (tmp_path / TABLE / "occupied").mkdir(parents=True)
    assert launch.conclude(tmp_path) == [0, 1]
    said = capsys.readouterr()
    assert "== 1 jobs, 0 failed\nseed  score  state  run\n1     0.5    done   /runs/0\n" in said.out
    assert said.err.startswith("launch.py: the sweep's summary could not be written: ")
    assert said.err.count("\n") == 1


def test_a_result_that_cannot_be_written_does_not_end_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(SWEEP, str(tmp_path / "file" / "sweep"))
    assert launch.recorded(result(3)) == 1
    assert "job 3 will not be in the sweep's table" in capsys.readouterr().err
