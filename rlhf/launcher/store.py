"""Trained stages by their inputs, so that the same stage is trained once: beside the runs, in a folder .stages.

An entry shares its files with the run that trained it (hard links), so it takes no room of its own as long as that run
exists, and outlives it.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TextIO

from rlhf.config.schema import Config
from rlhf.config.writing import whole_directory, write_json

FOLDER = ".stages"
MANIFEST = "manifest.json"
REUSED = "reused.json"
# What is drawn or written anew, or says nothing about what was trained.
_LEFT_OUT = ("plots", "wandb", "plan", "data", "report.md", "report.html", "stop", REUSED, MANIFEST)
_LEFT_OUT_BEGINNINGS = (".lock", "failed-", "earlier-", ".probe-")


def file_digest(path: Path) -> str:
    """BLAKE2 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def tree_digests(directory: Path) -> dict[str, str]:
    """The digest of every file below a directory by its relative name, but for what is not kept."""
    found = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory)
        left_out = name.parts[0] in _LEFT_OUT or name.parts[0].startswith(_LEFT_OUT_BEGINNINGS)
        if path.is_file() and not left_out:
            found[str(name)] = file_digest(path)
    return found


class StageStore:
    """Finds and keeps trained stages.

    Args:
        folder: where the entries are; created when the first one is kept.
        key_of: names the inputs of a stage's configuration; None for a stage that is not to be kept.
        stream: where damaged entries and waiting are told of.
    """

    def __init__(self, folder: Path, *, key_of: Callable[[Config], str | None], stream: TextIO) -> None:
        self._folder = folder
        self.key_of = key_of
        self._stream = stream

    def reserved(self, key: str, *, name: str) -> AbstractContextManager[object]:
        """Keep other runs away from a stage within the context; wait while one of them trains it. Raises OSError."""
        self._folder.mkdir(parents=True, exist_ok=True)
        lock = (self._folder / f"{key}.lock").open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{name}: another run trains the same stage; waiting for it", file=self._stream, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        return lock

    def find(self, key: str) -> Path | None:
        """The entry of a key if there is one whose files are what they were; a damaged one is deleted."""
        entry = self._folder / key
        if not entry.is_dir():
            return None
        try:
            files = json.loads((entry / MANIFEST).read_text(encoding="utf-8"))["files"]
        except (OSError, ValueError, KeyError):
            files = {}
        found = tree_digests(entry)
        damaged = [name for name in {**files, **found} if files.get(name) != found.get(name)]
        if not damaged and files:
            return entry
        what = f"its file {damaged[0]} has changed" if damaged else "its list of files is gone"
        print(f"the kept stage {entry} is damaged ({what}): it is trained again", file=self._stream, flush=True)
        shutil.rmtree(entry)
        return None

    def take(self, entry: Path, directory: Path) -> str:
        """Put an entry's files into a stage's directory and return the run directory that trained it."""
        manifest = json.loads((entry / MANIFEST).read_text(encoding="utf-8"))
        # The marks that the stage has finished come last: whoever is interrupted before leaves none.
        for name in sorted(manifest["files"], key=lambda name: name.startswith("done/")):
            _link(entry / name, directory / name)
        write_json(directory / REUSED, {"key": entry.name, "from": manifest["from"]})
        return str(manifest["from"])

    def keep(self, key: str, directory: Path) -> None:
        """Make a finished stage's directory the entry of a key."""
        files = tree_digests(directory)
        with whole_directory(self._folder / key) as partial:
            for name in files:
                _link(directory / name, partial / name)
            write_json(partial / MANIFEST, {"from": str(directory), "files": files})


def _link(source: Path, target: Path) -> None:
    """Make a second name for a file; a copy where it is not as readable as what is written here now, or cannot be."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    target.touch()
    usual = target.stat().st_mode
    if source.stat().st_mode == usual:
        target.unlink()
        with suppress(OSError):
            os.link(source, target)
            return
    shutil.copyfile(source, target)
