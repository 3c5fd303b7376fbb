"""The recorder's files, read back."""

import json
import math
import resource
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from rlhf.tracking.recorder import Recorder, format_seconds, git_commit, package_versions
from rlhf.tracking.records import Sample, append_row, read_json, read_rows

SAMPLE: Sample = {
    "prompt": "it's a",
    "responses": {"sft": {"text": "bore — 'äh'\n", "score": -0.5, "tokens": 4, "ended": True}},
}


class ListTracker:
    """A tracker that keeps what it is given."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, object]] = []
        self.finished = 0

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.calls.append(("metrics", step, dict(values)))

    def samples(self, step: int, rows: Sequence[Sample]) -> None:
        self.calls.append(("samples", step, list(rows)))

    def finish(self) -> None:
        self.finished += 1


def test_metrics_are_appended_with_stage_step_and_time(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, stage="sft", is_main=True, total_steps=2)
    recorder.metrics(1, {"train/loss": 1.5})
    recorder.metrics(2, {"train/loss": 1.25})
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [(row["stage"], row["step"], row["train/loss"]) for row in rows] == [("sft", 1, 1.5), ("sft", 2, 1.25)]
    assert abs(rows[0]["time"] - time.time()) < 60


def test_values_that_are_not_finite_become_null_and_are_warned_about_once(tmp_path: Path) -> None:
    tracker = ListTracker()
    recorder = Recorder(tmp_path, stage="ppo", is_main=True, trackers=[tracker], total_steps=2)
    recorder.metrics(1, {"train/loss": math.nan, "train/kl": 1.0})
    recorder.metrics(2, {"train/loss": math.inf, "train/kl": 1.0})
    assert [row["train/loss"] for row in read_rows(tmp_path / "metrics.jsonl")] == [None, None]
    warnings = [row["text"] for row in read_rows(tmp_path / "progress.jsonl")]
    assert warnings == ["warning: ppo step 1: train/loss is nan, recorded as null"]
    assert tracker.calls == [("metrics", 1, {"train/kl": 1.0}), ("metrics", 2, {"train/kl": 1.0})]


def test_samples_are_written_and_tracked(tmp_path: Path) -> None:
    tracker = ListTracker()
    recorder = Recorder(tmp_path, stage="sft", is_main=True, trackers=[tracker], total_steps=1)
    recorder.samples(7, [SAMPLE])
    recorder.close()
    assert read_rows(tmp_path / "samples.jsonl") == [{"stage": "sft", "step": 7, **SAMPLE}]
    assert tracker.calls == [("samples", 7, [SAMPLE])]
    assert tracker.finished == 1


def test_scores_that_are_not_finite_do_not_end_a_run(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, stage="ppo", is_main=True, total_steps=1)
    good, bad = ({"prompt": "p", "responses": {"ppo": {"text": "t", "score": score}}} for score in (1.0, math.nan))
    recorder.samples(1, [good, bad])
    recorder.samples(2, [bad])
    rows = read_rows(tmp_path / "samples.jsonl")
    assert [row["responses"]["ppo"]["score"] for row in rows] == [1.0, None, None]
    (warning,) = [row["text"] for row in read_rows(tmp_path / "progress.jsonl")]
    assert warning.startswith("warning: ppo step 1: 1 of 2 samples")


def test_progress_is_throttled_and_the_last_line_stays(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, stage="ppo", is_main=True, total_steps=200)
    for step in range(1, 201):
        recorder.progress(step, {"rollout/score": 1.5, "rollout/kl": 0.25}, tokens_per_second=12345.6)
    rows = read_rows(tmp_path / "progress.jsonl")
    assert 2 <= len(rows) <= 6
    assert rows[-1] == {"text": "ppo 200/200  score 1.500  kl 0.250  12,346 tokens/s", "transient": False}
    assert all(row["transient"] for row in rows[:-1])


def test_progress_tells_the_time_left(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, stage="rm", is_main=True, total_steps=11)
    recorder.progress(1, {})
    time.sleep(0.3)
    recorder.progress(2, {"eval/response_length": 1234.0, "train/loss": 12e-5})
    text = read_rows(tmp_path / "progress.jsonl")[-1]["text"]
    assert text == "rm   2/11  response length 1,234  loss 1.2e-04  3s left"


def test_phases_add_up_and_an_inner_phase_pauses_the_outer_one(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, stage="ppo", is_main=False, total_steps=1)
    started = time.perf_counter()
    for _ in range(2):
        with recorder.phase("generation"):
            time.sleep(0.02)
            with recorder.phase("scoring"):
                time.sleep(0.03)
    elapsed = time.perf_counter() - started
    assert recorder.phases["generation"] >= 0.04
    assert recorder.phases["scoring"] >= 0.06
    assert sum(recorder.phases.values()) <= elapsed


def test_a_phase_ends_on_an_exception(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, stage="ppo", is_main=False, total_steps=1)
    with pytest.raises(KeyError), recorder.phase("generation"):
        raise KeyError("x")
    before = dict(recorder.phases)
    with recorder.phase("update"):
        pass
    assert recorder.phases["generation"] == before["generation"]


@pytest.mark.processes
def test_summary_tells_what_was_run(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, stage="sft", is_main=True, total_steps=1)
    with recorder.phase("update"):
        pass
    recorder.summary(
        {"eval/loss": math.nan},
        {"eval/loss": 2.0},
        {"fingerprint": "abc", "counts": {"train": 3}},
        ranks=2,
        device="cpu",
    )
    summary = read_json(tmp_path / "summary.json")
    assert summary["before"] == {"eval/loss": None} and summary["after"] == {"eval/loss": 2.0}
    assert summary["data"] == {"fingerprint": "abc", "counts": {"train": 3}}
    assert summary["ranks"] == 2 and summary["device"] == "cpu" and summary["stage"] == "sft"
    assert list(summary["phases"]) == ["update"] and 0 <= summary["seconds"] < 60
    assert summary["versions"]["torch"] == package_versions()["torch"]
    assert summary["git_commit"] == git_commit()


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    tracker = ListTracker()
    recorder = Recorder(tmp_path / "run", stage="sft", is_main=False, trackers=[tracker], total_steps=1)
    recorder.metrics(1, {"train/loss": math.nan})
    recorder.samples(1, [SAMPLE])
    recorder.progress(1, {})
    recorder.line("hello")
    recorder.summary({}, {}, {})
    recorder.close()
    assert not (tmp_path / "run").exists()
    assert tracker.calls == [] and tracker.finished == 0


def test_a_row_cut_short_by_a_crash_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_row(path, {"step": 1})
    with path.open("a") as file:
        file.write(json.dumps({"step": 2})[:-3])
    assert read_rows(path) == [{"step": 1}]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.44, "0.4s"), (8.2, "8s"), (59.7, "1m00s"), (185, "3m05s"), (7800, "2h10m")]
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.processes
def test_records_wait_for_room_and_none_is_lost(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, stage="sft", is_main=True, total_steps=4)
    recorder.metrics(1, {"train/loss": 1.0})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for times in (1, 2):
        # As on a full disk: a part of the row can be written, but not the whole.
        size = (tmp_path / "metrics.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
        try:
            recorder.metrics(2 * times, {"train/loss": 2.0})
            recorder.samples(2 * times, [SAMPLE])
            with pytest.raises(OSError, match=r"Errno 2[78]"):
                recorder.summary(before={}, after={}, data={})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        recorder.metrics(2 * times + 1, {"train/loss": 3.0})
        assert (tmp_path / "metrics.jsonl").read_text().endswith("}\n")
    recorder.summary(before={}, after={}, data={})
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in read_rows(tmp_path / "samples.jsonl")] == [2, 4]
    assert read_json(tmp_path / "summary.json")["stage"] == "sft"


def test_a_text_with_other_line_ends_is_one_row(tmp_path: Path) -> None:
    rows = [{"text": "a\u2028b\x85c\x1c\ud800"}, {"text": "d"}]
    for row in rows:
        append_row(tmp_path / "samples.jsonl", row)
    assert read_rows(tmp_path / "samples.jsonl") == rows
    assert (tmp_path / "samples.jsonl").read_bytes().isascii()
