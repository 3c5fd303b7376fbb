"""How every file is written that another process or a later run reads: whole, or not at all.

It is written under a temporary name, flushed to disk and renamed. Its mode is what the umask says, whatever the library
that writes it thinks: safetensors gives 0600, `mkdtemp` 0700, and other users could not read a model. No torch.
"""

import errno
import fcntl
import glob
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path; what is written there becomes `path` at the end, and is dropped if something is raised.

    Directories above are made. Raises OSError as writing does; a full disk may be told by the flush only.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    mode = temporary.stat().st_mode & 0o777  # What the umask leaves; a writer may put another file in its place.
    try:
        yield temporary
        temporary.chmod(mode)
        _flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _flush(path.parent)


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Give a temporary directory that becomes `path` at the end; a directory that is there is replaced.

    If something is raised, what was there stays. What an earlier process that was killed has left is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    temporary = _beside(path)
    temporary.mkdir()
    mode = temporary.stat().st_mode & 0o777
    lock = os.open(temporary, os.O_RDONLY)
    try:
        with suppress(OSError):  # Some network file systems lock no directories.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield temporary
        for folder, _, files in os.walk(temporary):
            os.chmod(folder, mode)
            for name in files:
                entry = Path(folder, name)
                if not entry.is_symlink():
                    if entry.stat().st_nlink == 1:  # A second name of another's file keeps that one's mode.
                        entry.chmod(mode & 0o666)
                    _flush(entry)
            _flush(Path(folder))
        _put_in_place(temporary, path)
    finally:
        os.close(lock)
        shutil.rmtree(temporary, ignore_errors=True)
    _flush(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8): a reader finds the old one or the new one."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write a JSON file. Raises ValueError for numbers that are not finite: JSON has none."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _beside(path: Path) -> Path:
    """A hidden name in the same folder, and so on the same file system; short enough beside any name."""
    return path.with_name(f".{path.name[:50]}.{uuid.uuid4().hex[:12]}.partial")


def _remove_leftovers(path: Path) -> None:
    """Remove directories that a process which no longer lives was writing: a model may be large."""
    for left in path.parent.glob(f".{glob.escape(path.name[:50])}.*.partial"):
        with suppress(OSError):
            lock = os.open(left, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(lock)


def _put_in_place(temporary: Path, path: Path) -> None:
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        os.rename(temporary, path)
        return
    old = _beside(path)  # A directory that holds something cannot be replaced in one step.
    os.rename(path, old)
    try:
        os.rename(temporary, path)
    except OSError:
        os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    """Have a file's, or a directory's, content on disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems flush no directories, or nothing at all.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):
            raise
    finally:
        os.close(descriptor)
