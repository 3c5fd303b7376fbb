"""Which file another rank takes for the shared one."""

import errno
import os
from pathlib import Path

import pytest

from rlhf.engine import shared

FREE = "0" * 32


@pytest.fixture(autouse=True)
def one_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine whose processors share one memory, which it overcommits, whatever this one does."""
    monkeypatch.setattr(shared, "NODES", tmp_path)
    monkeypatch.setattr(shared, "OVERCOMMIT", tmp_path / "overcommit_memory")
    (tmp_path / "node0").mkdir()
    (tmp_path / "overcommit_memory").write_text("0\n")
    return tmp_path


def test_what_one_process_writes_another_reads() -> None:
    offer = shared._offered(64)
    assert offer is not None
    first, second = shared._mapped(*offer, 64), shared._mapped(*offer, 64)
    os.close(offer[1])
    assert first is not None and second is not None
    assert second[:] == bytes(64)
    first[60:] = b"here"
    assert second[60:] == b"here"


def test_no_other_file_is_opened(tmp_path: Path) -> None:
    offer = shared._offered(64)
    assert offer is not None
    process, file, name = offer
    assert shared._mapped(process, file, FREE, 64) is None
    os.close(file)
    assert shared._mapped(process, file, name, 64) is None
    with (tmp_path / f"memfd:{name}").open("wb") as other:
        other.write(bytes(64))
        other.flush()
        assert shared._mapped(process, other.fileno(), name, 64) is None


def test_processors_with_memory_of_their_own_share_none(one_memory: Path) -> None:
    (one_memory / "node1").mkdir()
    assert shared._offered(64) is None


def test_memory_that_may_not_be_there_when_it_is_written_is_not_offered(one_memory: Path) -> None:
    (one_memory / "overcommit_memory").write_text("2\n")
    assert shared._offered(64) is None


def test_memory_that_the_system_refuses_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    before = len(os.listdir("/proc/self/fd"))
    for call in ("ftruncate", "memfd_create", "scandir"):  # The last lists a machine's nodes.
        monkeypatch.setattr(os, call, refuse)
        assert shared._offered(64) is None
        assert len(os.listdir("/proc/self/fd")) == before
