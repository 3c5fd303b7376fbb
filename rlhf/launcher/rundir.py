"""The run directory: its name, whether it may be written, and who is writing it."""

import fcntl
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import Any

from rlhf.config.errors import ConfigError
from rlhf.config.files import read_yaml, to_plain
from rlhf.config.schema import Config
from rlhf.config.terminal import shown
from rlhf.config.writing import write_text

CONFIG, COMMAND, INPUTS = "config.yaml", "command.txt", "inputs.json"
_LOCK = ".lock"
# What does not change what is trained.
_IGNORED = ("run_dir", "cache_dir", "mode", "key", "reuse")
# What a machine has and costs: what follows from it, such as the ZeRO stage, is in the configuration itself.
_MACHINE = (
    *("host_memory_gib", "gpu_memory_gib", "threads_per_rank", "peak_tflops", "memory_bandwidth_gbs"),
    *("link_gbs", "network_gbs", "pcie_gbs", "price_per_gpu_hour"),
)
PLAN = "plan"  # What mode=plan writes into a run directory; it is no run.
DATA = "data"  # What mode=data writes there.


def _identity(values: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in values.items() if key not in _IGNORED}
    # Each machine of launcher=no_ssh has its own number.
    for group, ignored in (("launcher", ("node_rank",)), ("hardware", _MACHINE)):
        if isinstance(kept.get(group), dict):
            kept[group] = {key: value for key, value in kept[group].items() if key not in ignored}
    return kept


def with_run_dir(config: Config) -> Config:
    """Fill in the run directory, if there is none: runs/<stage>-<model>-<data>-seed<seed>-<hash>."""
    if config.run_dir is not None:
        return config
    content = json.dumps(_identity(to_plain(config)), sort_keys=True)
    digest = hashlib.blake2b(content.encode(), digest_size=4).hexdigest()
    model, data = (_name_part(name) for name in (config.model.name, config.data.name))
    name = f"{config.stage.name}-{model}-{data}-seed{config.seed}-{digest}"
    return replace(config, run_dir=str(Path("runs", name).absolute()))


def _name_part(name: str | None) -> str:
    """A name as part of a file's name: without what paths, shells and terminals read otherwise, and not too long."""
    return re.sub(r"[^\w.+-]+", "_", str(name)).encode()[:60].decode(errors="ignore")


def check_free(run_dir: Path) -> None:
    """Raise ConfigError if a path is a file, or a directory with something in it that is no run's."""
    if re.search(r"[\t\n]", str(run_dir)) or shown(str(run_dir)) != str(run_dir):
        # The launcher's log shows it as it is, and so do shells.
        raise ConfigError(f"run_dir={str(run_dir)!r} holds characters that cannot be shown: give another run_dir=")
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"run_dir={run_dir} is a file: give another run_dir=")
    if not run_dir.exists() or (run_dir / CONFIG).is_file():
        return
    own = (PLAN, DATA, _LOCK, f".{CONFIG}.", f".{DATA}.")
    foreign = [entry.name for entry in run_dir.iterdir() if not entry.name.startswith(own)]
    if foreign and not (run_dir / CONFIG).is_file():
        raise ConfigError(f"run_dir={run_dir} exists, is not empty and holds no run: give another run_dir=")


def check_run_dir(run_dir: Path, config: Config, *, finished: bool) -> bool:
    """Return whether an unfinished run is to be gone on with; raise ConfigError if the directory can't be used.

    `finished` is whether the directory holds a complete one.
    """
    check_free(run_dir)
    if not (run_dir / CONFIG).is_file():
        return False
    way_out = "To train anew, give another run_dir= and reuse=off, or delete that directory"
    changed = _differences(_identity(read_yaml(run_dir / CONFIG)), _identity(to_plain(config)))
    if changed:
        listed = ", ".join(changed[:8]) + (" …" if len(changed) > 8 else "")
        raise ConfigError(
            f"run_dir={run_dir} holds a run with another configuration (it differs in {listed}). {way_out}"
        )
    if finished:
        report = run_dir / "report.html"
        where = f": its report is {report}" if report.is_file() else ""
        raise ConfigError(f"run_dir={run_dir} holds this very run, which has finished{where}. {way_out}")
    return True


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """The keys in which two plain configurations differ."""
    found: list[str] = []
    for key in [*new, *(key for key in old if key not in new)]:
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, f"{prefix}{key}.")
        elif before != after or (key in old) != (key in new):
            found.append(f"{prefix}{key}")
    return found


@contextmanager
def claimed(run_dir: Path, *, name: str = _LOCK) -> Iterator[None]:
    """Create a run directory if need be and keep other launches away; raises ConfigError if one is at it."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / name).open("a")
    except OSError as error:
        raise ConfigError(f"run_dir={run_dir} cannot be written: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"run_dir={run_dir} is being written by another launch.py: wait for it") from error
        yield


def move_aside(directory: Path, *, name: str = "failed") -> Path | None:
    """Move what an attempt at a stage left in its directory to <name>-<n> within it; None if there is nothing."""
    if not (directory / COMMAND).is_file():
        return None
    number = 1
    while (target := directory / f"{name}-{number}").exists():
        number += 1
    target.mkdir()
    for entry in list(directory.iterdir()):
        if entry.name not in (PLAN, DATA) and not entry.name.startswith((_LOCK, "failed-", "earlier-")):
            entry.rename(target / entry.name)
    return target


def folder_beside(run_dir: Path, name: str) -> Path:
    """Where mode=plan or mode=data writes: into the run's directory, or beside it where that holds a run already."""
    # Nor into one that holds the run, as a pipeline's is of its stages.
    around = [place for place in run_dir.parents if (place / CONFIG).is_file() and any(place.glob(f"{_LOCK}*"))]
    run_dir = around[-1] if around else run_dir
    suffixes = chain([""], (f"-{number}" for number in count(2)))
    beside = (run_dir.with_name(f"{run_dir.name}-{name}{suffix}") for suffix in suffixes)
    places = beside if (run_dir / CONFIG).is_file() else chain([run_dir / name], beside)
    # A launch locks the directory that it runs in; a plan does not.
    return next(place for place in places if not any(place.glob(f"{_LOCK}*")))


def write_files(directory: Path, files: Mapping[str, str]) -> None:
    """Write texts by name into a directory, which is created. Files that are there are replaced, not overwritten."""
    for name, text in files.items():
        write_text(directory / name, text)
