"""Which files of rows a path names: one file, what lies below a directory, or a set that `datasets` saved.

Of a directory are left out: hidden files and folders, files of other kinds, and, where names tell training rows from
others, what is not of the wanted split. A link is followed, and nothing is read twice.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.config.errors import DataError
from rlhf.config.regular import kind_of, read_small_text
from rlhf.config.terminal import shown_name

TRAIN = "train"
_SAVED_SET, _SAVED_DICT, _SAVED_INFO = "state.json", "dataset_dict.json", "dataset_info.json"
# Bytes of the JSON files that `datasets` writes beside the rows of a saved set.
_LARGEST_STATE = 16 * 1024**2
# How names tell splits, as `datasets` has it; what is held out by whatever name counts as one.
_SPLITS = {
    TRAIN: ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_NO_FOLDERS = ("__pycache__", "__MACOSX")


@dataclass(slots=True)
class RowFiles:
    """The files to read in order, and how many others were left out and why."""

    files: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def find_row_files(path: Path, *, split: str, endings: Sequence[str], key: str) -> RowFiles:
    """The files with rows that a path names; raises DataError for what cannot be read, OSError for a path that is none.

    `split` is which part of a saved DatasetDict is read, or of a directory whose names tell parts; `key` is the option
    that sets it.
    """
    if kind_of(path) != "directory":
        return RowFiles(files=[path])
    walk = _Walk(split, tuple(endings), key)
    try:
        walk.folder(path)
    except RecursionError as error:
        raise DataError(f"{shown_name(path)}: its folders are nested too deeply") from error
    return walk.of_split(path)


def has_ending(name: str, endings: Sequence[str]) -> bool:
    """Whether a file's name has one of the endings, in capitals or not."""
    return name.lower().endswith(tuple(endings))


class _Walk:
    """Goes through a directory in the order of names."""

    def __init__(self, split: str, endings: tuple[str, ...], key: str) -> None:
        self._split, self._endings, self._key = split, endings, key
        self._seen: set[tuple[int, int]] = set()
        self._found = RowFiles()
        self._chosen: set[Path] = set()  # Files of saved sets: their names tell no split.

    def folder(self, directory: Path) -> None:
        """Add the files of a directory and of those below it."""
        try:
            if self._was_seen(directory):
                return
            names = sorted(os.listdir(directory))
        except OSError as error:
            raise DataError(f"{shown_name(directory)} cannot be read: {error.strerror}") from error
        if _SAVED_DICT in names:
            self.folder(directory / self._split_of_saved(directory))
        elif _SAVED_SET in names and _SAVED_INFO in names:
            self._saved_set(directory)
        else:
            for name in names:
                self._entry(directory / name)

    def _entry(self, path: Path) -> None:
        if path.name.startswith(".") or path.name in _NO_FOLDERS:
            self._found.left_out["hidden"] += 1
            return
        try:
            kind = kind_of(path)
            if kind == "directory":
                self.folder(path)
            elif not has_ending(path.name, self._endings):
                self._found.left_out["of other kinds"] += 1
            elif kind != "file":
                raise DataError(
                    f"{shown_name(path)} {f'is {kind}' if kind else 'is a link to nothing'}, not a regular file"
                )
            elif not self._was_seen(path):
                self._found.files.append(path)
        except OSError as error:
            raise DataError(f"{shown_name(path)} cannot be read: {error.strerror}") from error

    def _was_seen(self, path: Path) -> bool:
        status = path.stat()
        one = status.st_dev, status.st_ino
        seen = one in self._seen
        self._seen.add(one)
        return seen

    def _saved_set(self, directory: Path) -> None:
        """The files that `state.json` lists: beside them lie what `map` and `shuffle` kept for themselves."""
        entries = _read_object(directory / _SAVED_SET).get("_data_files")
        names = [entry.get("filename") if isinstance(entry, dict) else None for entry in _as_list(entries)]
        if not names or not all(isinstance(name, str) and name == os.path.basename(name) for name in names):
            raise DataError(f"{shown_name(directory / _SAVED_SET)} lists no files of rows: save the set again")
        for name in names:
            path = directory / str(name)
            self._chosen.add(path)
            self._entry(path)
        others = [name for name in os.listdir(directory) if has_ending(name, self._endings)]
        if left := len(set(others) - {*names, _SAVED_SET, _SAVED_INFO}):
            self._found.left_out["beside the saved set"] += left

    def _split_of_saved(self, directory: Path) -> str:
        splits = [str(name) for name in _as_list(_read_object(directory / _SAVED_DICT).get("splits"))]
        if self._split not in splits or self._split != os.path.basename(self._split):
            listed = ", ".join(shown_name(name) for name in splits) or "none"
            # Hub sets have several trainings in one: train_sft, train_prefs.
            wanted = _split_in([self._split])
            meant = next((name for name in splits if wanted is not None and _split_in([name]) == wanted), None)
            told = f"set {self._key}={shown_name(meant)}" if meant else f"name one of them in {self._key}"
            raise DataError(
                f"{shown_name(directory)} is a saved DatasetDict with the splits {listed}, without "
                f"{shown_name(self._split)}: {told}"
            )
        for name in splits:
            if name != self._split:
                self._found.left_out[f"of split {shown_name(name)}"] += 1
        return self._split

    def of_split(self, root: Path) -> RowFiles:
        """What was found, without the files that names say are of another split."""
        wanted = _split_in([self._split]) or self._split
        told = {path: _split_in(path.relative_to(root).parts) for path in self._found.files if path not in self._chosen}
        if wanted == TRAIN and TRAIN not in told.values():
            return self._found
        for path, split in told.items():
            # Beside train.jsonl, a file whose name tells nothing is for training, too.
            if (split or TRAIN) != wanted:
                self._found.left_out[f"of split {split or TRAIN}"] += 1
                self._found.files.remove(path)
        return self._found


def _split_in(names: Sequence[str]) -> str | None:
    """The split that a path's last telling name tells: train-00000-of-00002.parquet, test/rows.jsonl."""
    for name in reversed(names):
        words = re.split(r"[^a-z]+", name.lower())
        for split, spellings in _SPLITS.items():
            if any(spelling in words for spelling in spellings):
                return split
    return None


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_small_text(path, at_most=_LARGEST_STATE))
    except OSError as error:
        raise DataError(f"{shown_name(path)} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{shown_name(path)} is not valid JSON: save the set again") from error
    return content if isinstance(content, dict) else {}
