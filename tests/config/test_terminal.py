"""What reaches a screen steers nothing, and a screen that is gone ends nothing."""

import io
import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf.config.terminal import Screen, guard_output, shown, shown_json, steer
from rlhf.launcher.command import PROJECT

HOSTILE = "\x1b]0;title\x07\x9b31mred\x08\x7f\u202eabc\u2028\ud800"
ESCAPED = r"\x1b]0;title\x07\x9b31mred\x08\x7f\u202eabc\u2028\ud800"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (HOSTILE, ESCAPED),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("of\r\nWindows", "of\nWindows"),
        ("over\rwritten", r"over\x0dwritten"),
        ("naïve 映画 فيلم 👩‍👩‍👧 \u00a0!", "naïve 映画 فيلم 👩‍👩‍👧 \u00a0!"),
        (r"\x1b is text already", r"\x1b is text already"),
        ("", ""),
    ],
)
def test_what_would_steer_a_terminal_is_shown_as_text(text: str, expected: str) -> None:
    assert shown(text) == expected
    assert shown(expected) == expected


def test_json_lines_steer_nothing_and_mean_the_same() -> None:
    line = shown_json(json.dumps({HOSTILE: [HOSTILE, "é"]}, ensure_ascii=False))
    assert line == shown(line) and "é" in line
    line.encode()
    assert json.loads(line) == {HOSTILE: [HOSTILE, "é"]}


class Broken(io.StringIO):
    """A stream of a terminal that has gone."""

    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")

    def flush(self) -> None:
        self.write("")


def test_a_screen_escapes_all_but_the_programs_own_sequences() -> None:
    below = io.StringIO()
    screen = Screen(below, lasting=True)
    print(HOSTILE, file=screen)
    steer(screen, "\r\x1b[2K")
    screen.write("\r50 %\r")
    assert below.getvalue() == f"{ESCAPED}\n\r\x1b[2K\r50 %\r"
    steer(below, "\x1b[0m")
    assert below.getvalue().endswith("\x1b[0m")


@pytest.mark.parametrize(
    ("encoding", "expected"), [("ascii", rb"film: \u6620\xe9 \ud800"), ("latin-1", b"film: \\u6620\xe9 \\ud800")]
)
def test_a_screen_without_some_characters_shows_their_numbers(encoding: str, expected: bytes) -> None:
    raw = io.BytesIO()
    below = io.TextIOWrapper(raw, encoding=encoding)
    screen = Screen(below, lasting=False)
    print("film: 映é \ud800", file=screen, flush=True)
    assert raw.getvalue() == expected + b"\n"


@pytest.mark.parametrize("lasting", [True, False])
def test_a_screen_that_is_gone_ends_only_what_talks_to_it(lasting: bool) -> None:
    screen = Screen(Broken(), lasting=lasting)
    if lasting:
        print("still training", file=screen, flush=True)
        assert screen.isatty() is False
    else:
        with pytest.raises(OSError, match="Input/output"):
            print("an answer", file=screen)


PROGRAM = """
import contextlib, os, sys
from rlhf.config.terminal import guard_output
guard_output(); guard_output()
for _ in range(3):
    for stream in (sys.stdout, sys.stderr):
        print("x" * 100_000, file=stream, flush=True)
print("no flush")
with open(sys.argv[1], "w") as file:
    with contextlib.suppress(OSError):
        os.write(1, b"what a library in C prints")
    file.write("done")
"""


@pytest.mark.processes
@pytest.mark.parametrize("ending", ["terminal", "pipe", "closed", "full"])
def test_a_process_outlives_its_output(tmp_path: Path, ending: str) -> None:
    report, program = tmp_path / "report", [sys.executable, "-S", "-c", PROGRAM, str(tmp_path / "report")]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    if ending == "closed":
        argv = ["sh", "-c", '"$@" >&- 2>&- <&-', "sh", *program]
        done = subprocess.run(argv, env=environment, timeout=60, check=False)
    else:
        ours, theirs = pty.openpty() if ending == "terminal" else os.pipe()
        if ending == "full":
            theirs = os.open("/dev/full", os.O_WRONLY)
        os.close(ours)
        done = subprocess.run(
            program, env=environment, stdout=theirs, stderr=theirs, timeout=60, check=False, start_new_session=True
        )
        os.close(theirs)
    assert (done.returncode, report.exists() and report.read_text()) == (0, "done")


UNREAD = """
import sys, time
from rlhf.config.terminal import Outlet, guard_output
Outlet.last_patience = float(sys.argv[1])
guard_output()
for number in range(300):
    print(number, "y" * 10_000, flush=True)
open(sys.argv[2], "w").close()
print("the end")
"""


@pytest.mark.processes
def test_who_does_not_read_for_a_while_holds_nothing_up(tmp_path: Path) -> None:
    program = [sys.executable, "-S", "-c", UNREAD]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    with subprocess.Popen([*program, "60", str(tmp_path / "went on")], env=environment, stdout=subprocess.PIPE) as job:
        assert job.stdout is not None
        wait_for(tmp_path / "went on")
        printed = job.stdout.read().decode()
        assert job.wait(timeout=60) == 0
    whole, _, said = printed.partition("\n[")
    assert (
        len(whole) > 900_000
        and whole.startswith("0 yyy")
        and said.endswith(" bytes that nobody took are left out here]\n")
    )
    assert set(whole.split("y")) <= {"", *(f"{'' if number == 0 else chr(10)}{number} " for number in range(300))}
    # And who never reads keeps no process.
    with subprocess.Popen([*program, "0.1", str(tmp_path / "ended")], env=environment, stdout=subprocess.PIPE) as job:
        assert job.wait(timeout=60) == 0
    assert (tmp_path / "ended").exists()


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_guarding_twice_is_guarding_once(monkeypatch: pytest.MonkeyPatch) -> None:
    below = io.StringIO()
    monkeypatch.setattr(sys, "stdout", below)
    monkeypatch.setattr(sys, "stderr", None)
    guard_output()
    first = sys.stdout, sys.stderr
    guard_output()
    assert (sys.stdout, sys.stderr) == first
    print("\x07")
    print("nobody", file=sys.stderr)
    assert below.getvalue() == "\\x07\n"
