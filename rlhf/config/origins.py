"""Where each value of a composed configuration came from: a file of a group, the tuned values, the command line."""

import os
from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode

from rlhf.config.fields import field_doc
from rlhf.config.files import to_plain

COMMAND_LINE = "command line"


def value_origins(conf: Path) -> dict[str, str]:
    """Map the dotted keys that files or the command line set to what set them last.

    Called while Hydra runs a job; `conf` is the directory of the groups. A file that tunes values, or that is an
    experiment or a sweep, is called by its place, such as conf/tuned/ppo-tiny.yaml; one of --config-dir by its path.
    """
    hydra = HydraConfig.get()
    given = OverridesParser.create().parse_overrides([*hydra.overrides.hydra, *hydra.overrides.task])
    defaults = (
        GlobalHydra.instance()
        .config_loader()
        .compute_defaults_list(hydra.job.config_name, [*hydra.overrides.hydra, *hydra.overrides.task], RunMode.RUN)
    )
    origins: dict[str, str] = {}
    places = [Path(source.path) for source in hydra.runtime.config_sources if source.schema == "file"]
    for entry in defaults.defaults:
        path = next((found for place in places if (found := place / f"{entry.config_path}.yaml").is_file()), None)
        if entry.config_path and path is not None:
            content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
            prefix = "" if entry.package in (None, "", "_global_") else f"{entry.package}."
            own = path.is_relative_to(conf)
            name = f"conf/{entry.config_path}.yaml" if own else os.path.relpath(path)
            origins |= {f"{prefix}{key}": name for key in _leaves(content)}
    groups = {path.name for path in conf.iterdir()}
    for override in given:
        key = str(override.key_or_group)
        value = override.value()
        if isinstance(value, dict):
            origins |= {leaf: COMMAND_LINE for leaf in _leaves(value, f"{key}.")}
        elif key.split("@")[0] not in groups or "." in key:
            origins = {known: source for known, source in origins.items() if not known.startswith(f"{key}.")}
            origins[key] = COMMAND_LINE
    return origins


def _leaves(content: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in content.items():
        if not prefix and key in ("defaults", "hydra"):
            continue
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def origin_of(key: str, origins: dict[str, str]) -> str:
    """What set a key: itself, or a mapping that it is in; "default" if nothing did."""
    while key:
        if key in origins:
            return origins[key]
        key = key.rpartition(".")[0]
    return "default"


def located(problem: str, origins: dict[str, str]) -> str:
    """A problem of the form "key=value: …" with where the value came from, unless that is the command line."""
    key = problem.split("=")[0]
    origin = origin_of(key, origins) if all(part.isidentifier() for part in key.split(".")) else COMMAND_LINE
    return problem if origin in (COMMAND_LINE, "default") else f"{problem} (from {origin})"


def flat_values(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and plain values of a configuration object."""
    for entry in fields(config):
        value, key = getattr(config, entry.name), f"{prefix}{entry.name}"
        if is_dataclass(value):
            yield from flat_values(value, f"{key}.")
        elif isinstance(value, dict) and value and all(is_dataclass(inner) for inner in value.values()):
            for name, inner in value.items():
                yield from flat_values(inner, f"{key}.{name}.")
        else:
            yield key, to_plain(value)


def field_docs(config: Any) -> dict[str, str]:
    """The documentation of the field of every dotted key."""
    return {key: field_doc(entry) for key, entry in fields_by_key(config).items()}


def fields_by_key(config: Any, prefix: str = "") -> dict[str, "Field[Any]"]:
    """The declared field of every dotted key."""
    found: dict[str, Field[Any]] = {}
    for entry in fields(config):
        value, key = getattr(config, entry.name), f"{prefix}{entry.name}"
        found[key] = entry
        inner = {"": value} if is_dataclass(value) else value if isinstance(value, dict) else {}
        for name, nested in inner.items():
            if is_dataclass(nested):
                found |= fields_by_key(nested, f"{key}.{name}." if name else f"{key}.")
    return found
