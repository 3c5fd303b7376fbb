"""Errors of the file system become a sentence, wherever they come from."""

import errno
import os
from pathlib import Path

import pytest

from rlhf.__main__ import is_user_error, told
from rlhf.config.storage import probe, storage_problem


def raised_from(cause: BaseException) -> BaseException:
    """An error of another kind that follows one of the file system."""
    try:
        raise RuntimeError("cannot save") from cause
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/runs/a"), "/runs/a: the disk is full: make room"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full: make room"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the quota on the disk is used up: make room"),
        (OSError(errno.EROFS, "Read-only file system"), "the file system cannot be written to: make it writable"),
        (Exception("Error while serializing: No space left on device (os error 28)"), "the disk is full: make room"),
        (raised_from(OSError(errno.EDQUOT, "")), "the quota on the disk is used up: make room"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), None),
        (ValueError("28"), None),
        (
            PermissionError(errno.EACCES, "Permission denied", "/cache/data/x.lock"),
            "/cache/data/x.lock: this user has no permission there: change the permissions, or give another path",
        ),
        (PermissionError(errno.EACCES, "Permission denied"), None),
        (raised_from(PermissionError(errno.EACCES, "Permission denied", "/root")), None),
    ],
)
def test_a_disk_that_takes_nothing_is_told_in_a_sentence(error: BaseException, expected: str | None) -> None:
    assert storage_problem(error) == expected
    assert is_user_error(error) == (expected is not None)


def test_what_a_rank_says_names_what_exists(tmp_path: Path) -> None:
    error = OSError(errno.ENOSPC, "No space left on device")
    again = "the disk is full: make room, and give the same command again"
    assert told(error, tmp_path) == f"{again}; no model has been written"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    assert told(error, tmp_path) == f"{again}; the trained model is in {tmp_path / 'model'}"
    assert told(ValueError("pumpkin"), tmp_path) == f"pumpkin; the trained model is in {tmp_path / 'model'}"
    assert told(ValueError("pumpkin"), tmp_path / "other") == "pumpkin"


def test_a_directory_is_tried_out(tmp_path: Path) -> None:
    assert probe(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    assert "No such file" in str(probe(tmp_path / "gone"))


def test_a_limit_on_files_is_told(tmp_path: Path) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        why = probe(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert why is not None and "ulimit -f" in why
    assert list(tmp_path.iterdir()) == [] and os.path.isdir(tmp_path)
