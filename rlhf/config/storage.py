"""What the operating system says of files that cannot be written or read, and what a person has to mend."""

import contextlib
import errno
import os
import re
import tempfile
import uuid
from pathlib import Path

_REASONS = {
    errno.ENOSPC: "the disk is full: make room",
    errno.EDQUOT: "the quota on the disk is used up: make room",
    errno.EROFS: "the file system cannot be written to: make it writable",
    errno.EFBIG: "a file would be larger than this process may write: raise the limit (ulimit -f)",
    errno.EIO: "the disk fails (input/output error): look at the system's log",
    errno.ESTALE: "the network file system has gone: mount it again",
}
# Libraries in Rust, such as safetensors and tokenizers, give the number in the text only.
_RUST = re.compile(r"\(os error (\d+)\)")
_NOT_ALLOWED = "this user has no permission there: change the permissions, or give another path"
_PROBE_BYTES = 1 << 16


def default_cache() -> Path:
    """Where what can be made again is kept if nothing else is said: $RLHF_CACHE, else ~/.cache/rlhf."""
    chosen = os.environ.get("RLHF_CACHE") or "~/.cache/rlhf"
    try:
        return Path(chosen).expanduser().resolve()
    except RuntimeError:  # Neither HOME nor an entry of this user in the system's list.
        return Path(tempfile.gettempdir()) / f"rlhf-{os.getuid()}"


def storage_problem(error: BaseException | None) -> str | None:
    """Why files cannot be written, if that is what an error, or one that it followed, is about; None otherwise."""
    seen: set[int] = set()
    # Libraries try places that they may not use, and go on; so only the error itself counts.
    if isinstance(error, PermissionError) and error.filename:
        return f"{error.filename}: {_NOT_ALLOWED}"
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        number = error.errno if isinstance(error, OSError) else None
        if number is None and (found := _RUST.search(str(error))) is not None:
            number = int(found[1])
        if number in _REASONS:
            path = error.filename if isinstance(error, OSError) and error.filename else None
            return f"{path}: {_REASONS[number]}" if path else _REASONS[number]
        error = error.__cause__ or error.__context__
    return None


def exported(directory: Path) -> str:
    """What is there of a stage that could not write all its files."""
    model = directory / "model"
    return f"the trained model is in {model}" if (model / "config.json").is_file() else "no model has been written"


def probe(directory: Path) -> str | None:
    """Why a directory cannot be written to, found out by trying; None if it can."""
    path = directory / f".probe-{uuid.uuid4().hex}"
    try:
        with path.open("wb") as file:
            file.write(os.urandom(_PROBE_BYTES))
            os.fsync(file.fileno())
    except OSError as error:
        return storage_problem(error) or f"{directory}: {error.strerror}"
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    return None
