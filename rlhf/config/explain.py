"""Hydra's and OmegaConf's errors in one message each: what is wrong, where, and what would work."""

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import yaml
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from rlhf.config.advice import yaml_reason


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Return ": did you mean …?" with the nearest valid names, or else ": valid are …"."""
    names = list(valid)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if near:
        return f": did you mean {' or '.join(near)}?"
    return f": valid are {', '.join(names)}" if names else ""


def explain(error: BaseException) -> str:
    """Return one message for an error that Hydra or OmegaConf raised while composing a configuration."""
    if isinstance(error, yaml.YAMLError):
        mark = getattr(error, "problem_mark", None)
        return f"{getattr(mark, 'name', None) or getattr(error, 'name', 'a YAML file')}{yaml_reason(error)}"
    place = re.match(r"In '([^']+)'", str(error))
    where = f" (in {place[1]}.yaml)" if place and not place[1].startswith(("schema/", "config")) else ""
    return _reason(error) + where


def _reason(error: BaseException) -> str:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException | MissingConfigException):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        return _unknown_key(str(cause.full_key or cause.key), _keys_of(cause))
    if isinstance(cause, MissingConfigException):
        return _unknown_option(cause)
    if isinstance(cause, OmegaConfBaseException):
        reason = str(cause).strip().split("\n")[0]
        if "is not a ListConfig" in reason:
            reason = f"needs a list, as in  {cause.full_key}=[first,second]"
        return f"{cause.full_key}: {reason}" if cause.full_key else reason
    return str(error).strip() or type(error).__name__


def unknown_keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Yield a message for every key of a composed configuration that its dataclass does not have."""
    if not isinstance(node, DictConfig):
        return
    schema = OmegaConf.get_type(node)
    valid = [entry.name for entry in fields(schema)] if schema is not None and is_dataclass(schema) else None
    for key in node:
        full_key = f"{prefix}.{key!s}" if prefix else str(key)
        if valid is not None and key not in valid:
            yield _unknown_key(full_key, valid)
        else:
            yield from unknown_keys(node._get_node(key), full_key)


def left_out_keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Yield a message for every option of a composed configuration that was removed or is `???`.

    Their defaults would silently be taken for them.
    """
    if not isinstance(node, DictConfig) or node._is_none():
        return
    schema = OmegaConf.get_type(node)
    for entry in fields(schema) if schema is not None and is_dataclass(schema) else ():
        if entry.name not in node._content:  # type: ignore[operator]
            yield f"~{prefix}{entry.name}: an option cannot be removed; give it another value"
    for key in list(node):
        if OmegaConf.is_missing(node, key):
            yield f"{prefix}{key!s}=???: needs a value"
        else:
            yield from left_out_keys(node._get_node(key), f"{prefix}{key!s}.")


def _unknown_key(full_key: str, valid: list[str]) -> str:
    parent, _, key = full_key.rpartition(".")
    prefix = f"{parent}." if parent else ""
    near = difflib.get_close_matches(key, valid, n=3, cutoff=0.6)
    if near:
        return f"unknown key {full_key}: did you mean {' or '.join(prefix + name for name in near)}?"
    where = f" in {parent}" if parent else ""
    return f"unknown key {full_key}: valid keys{where} are {', '.join(valid)}" if valid else f"unknown key {full_key}"


def _keys_of(error: OmegaConfBaseException) -> list[str]:
    schema = error.object_type
    if isinstance(schema, type) and is_dataclass(schema):
        return [entry.name for entry in fields(schema)]
    node: Any = error.parent_node
    return [str(key) for key in node] if isinstance(node, DictConfig) else []


def _unknown_option(error: MissingConfigException) -> str:
    group, _, name = str(error.missing_cfg_file or "").rpartition("/")
    options = list(error.options or []) or re.findall(r"^\t(\S+)$", str(error), flags=re.MULTILINE)
    if not group:
        return str(error).strip()
    near = difflib.get_close_matches(name, options, n=3, cutoff=0.5)
    if near:
        return f"{group}={name}: there is no such option; did you mean {group}={' or '.join(near)}?"
    return f"{group}={name}: there is no such option; options of {group} are {', '.join(options)}"
