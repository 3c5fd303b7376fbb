"""The training stages. A folder here with a config.py is a stage: nothing else names them. Imports no torch."""

import functools
import importlib
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf.config.errors import ConfigError
from rlhf.config.explain import did_you_mean, explain, left_out_keys
from rlhf.config.files import read_yaml, typed_config, write_config
from rlhf.config.schema import Config, SourceConfig, StageConfig

__all__ = ["from_composed", "read_config", "register_schemas", "stage_config_class", "stage_names", "write_config"]


def stage_names() -> list[str]:
    """The names of all stages, in alphabetical order."""
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/config.py"))


def stage_config_class(name: str) -> type[StageConfig]:
    """Return the configuration class of a stage; an unknown name raises ConfigError."""
    if name not in stage_names():
        raise ConfigError(f"stage.name={name}: there is no such stage{did_you_mean(name, stage_names())}")
    module = importlib.import_module(f"rlhf.stages.{name}.config")
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, StageConfig) and value.__module__ == module.__name__
    ]
    assert len(classes) == 1, f"{module.__name__} must define exactly one StageConfig"
    return classes[0]


@functools.cache
def register_schemas() -> None:
    """Give Hydra the dataclasses: schema/config, schema/GROUP for every group, schema/stage/NAME for every stage."""
    store = ConfigStore.instance()
    store.store(group="schema", name="config", node=Config)
    defaults = Config()
    for group in ("model", "data", "hardware", "memory", "lora", "rollout", "scorer", "tracking", "launcher"):
        store.store(group="schema", name=group, node=type(getattr(defaults, group)))
    store.store(group="schema", name="source", node=SourceConfig)
    for name in stage_names():
        store.store(group="schema/stage", name=name, node=stage_config_class(name))


def _typed(content: Any, stage: Any) -> Config:
    name = stage.get("name") if hasattr(stage, "get") else None
    if not isinstance(name, str):
        raise ConfigError(f"stage.name={name!r}: give the name of a stage, one of {', '.join(stage_names())}")
    return typed_config(content, stage_config_class(name))


def from_composed(composed: Any) -> Config:
    """Turn what Hydra composed into typed objects."""
    try:
        OmegaConf.resolve(composed)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
    if problems := list(left_out_keys(composed)):
        raise ConfigError(*problems)
    return _typed(composed, composed.stage)


def read_config(path: Path) -> Config:
    """Read a run directory's config.yaml into typed objects; unknown keys and wrong types raise ConfigError."""
    content = read_yaml(path)
    if "stage" not in content:
        raise ConfigError(f"the configuration {path} has no key 'stage'")
    return _typed(content, content["stage"])
