"""Configurations as YAML and as typed objects."""

import functools
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf.config.errors import ConfigError
from rlhf.config.explain import explain, unknown_keys
from rlhf.config.schema import Config, StageConfig
from rlhf.config.writing import write_text


def to_plain(value: Any) -> Any:
    """Turn a configuration into dicts, lists and scalars; enums become their names."""
    if is_dataclass(value):
        return {entry.name: to_plain(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, dict):
        return {key: to_plain(entry) for key, entry in value.items()}
    return [to_plain(entry) for entry in value] if isinstance(value, list) else value


def to_yaml(config: Config) -> str:
    """Render a configuration as YAML that `typed_config` understands."""
    return str(yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True, width=120))


def write_config(config: Config, path: Path) -> None:
    """Write a configuration as YAML; the file appears complete or not at all."""
    write_text(path, to_yaml(config))


@functools.cache
def _schema(stage: Callable[[], StageConfig]) -> Any:
    """The options with their types and defaults; building it takes longer than anything else here."""
    return OmegaConf.structured(replace(Config(), stage=stage()))


def typed_config(content: Any, stage: Callable[[], StageConfig]) -> Config:
    """Check a mapping against the schema and return typed objects.

    `content` is a mapping or an OmegaConf node; `stage` is the stage's own configuration class.
    Unknown keys and wrong types raise ConfigError.
    """
    try:
        merged = OmegaConf.merge(_schema(stage), content)
        if unknown := list(unknown_keys(merged)):
            raise ConfigError(*unknown)
        return cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; a missing or broken file raises ConfigError."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"the configuration {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"the configuration {path} holds no mapping of keys to values")
    return content
