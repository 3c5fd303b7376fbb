"""Files that a user names: only regular ones are opened, so that a named pipe or a device neither blocks nor floods.

And names as they may be shown: a file's name can hold line breaks, terminal escapes and bytes that are no UTF-8.
"""

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def kind_of(path: Path) -> str | None:
    """What a path names: file, directory, another kind in words, or None if there is nothing.

    Raises OSError where that cannot be told: a name that is too long or has null bytes, a folder that is closed to us.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:  # A null byte.
        raise OSError(errno.EINVAL, str(error)) from error
    if stat.S_ISREG(mode):
        return "file"
    return "directory" if stat.S_ISDIR(mode) else _KINDS.get(stat.S_IFMT(mode), "no file")


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading; raises OSError, also for what is no regular file."""
    try:
        # Opening a pipe would wait for its other end.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:
        raise OSError(errno.EINVAL, str(error)) from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"is {_KINDS.get(stat.S_IFMT(mode), 'no file')}, not a regular file")
    return os.fdopen(descriptor, "rb")


def read_small_text(path: Path, *, at_most: int) -> str:
    """The text of a regular file of at most so many bytes; what is no UTF-8 is replaced. Raises OSError."""
    with open_regular(path) as file:
        content = file.read(at_most + 1)
    if len(content) > at_most:
        raise OSError(errno.EFBIG, f"is longer than {at_most} bytes")
    return content.decode("utf-8", errors="replace")
