"""What a stage's result depends on, as one hash. Imports no torch."""

import hashlib
import importlib.util
import json
from dataclasses import replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from rlhf.config.files import to_plain
from rlhf.config.schema import Config, ModelConfig, WeightSource
from rlhf.data.prepare import content_fingerprint
from rlhf.launcher.command import PROJECT
from rlhf.launcher.store import file_digest, tree_digests
from rlhf.models.tokenizer import package_directory
from rlhf.stages.best_of_n.config import BestOfNConfig
from rlhf.stages.ppo.config import PPOConfig

_PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "datasets", "peft")


def stage_key(config: Config) -> str | None:
    """One hash of all that `stage_inputs` tells apart.

    None for a stage that asks a server: what that answers cannot be known.
    """
    if "scorer" in config.stage.inputs() and config.scorer.kind == "http":
        return None
    return f"{config.stage.name}-{_digest(stage_inputs(config))}"


def stage_inputs(config: Config) -> dict[str, str]:
    """Hash what a stage is made of: options, data and weights by their content, ranks, and code with its packages.

    Where it is written, how its ranks are reached and tracked, and how many threads it has do not matter.
    """
    stage = to_plain(config.stage)
    for key in ("objective",):
        stage.pop(key)
    weights: dict[str, Any] = {}
    for key, value in stage.items():
        if key.endswith("_model") and isinstance(value, str):
            weights[key], stage[key] = _weights(value), None
    code: list[Any] = [code_version()]
    groups: dict[str, Any] = {}
    for name in config.stage.inputs():
        value = getattr(config, name)
        groups[name] = to_plain(value)
        if isinstance(value, ModelConfig) and (found := _model(value)) is not None:
            weights[name] = found
            groups[name]["path"] = None
    if "scorer" in groups:
        weights["others"] = [_weights(path) for path in config.scorer.others]
        groups["scorer"] |= {"others": len(config.scorer.others), "function": config.scorer.function is not None}
        code.append(_function(config.scorer.function))
    if isinstance(config.stage, PPOConfig):
        code.append(_function(config.stage.advantage))
    # The judge is asked by PPO alone.
    judge = config.data.judge if isinstance(config.stage, PPOConfig | BestOfNConfig) else None
    data = to_plain(replace(config.data, judge=judge, workers=None))
    sources = {name: to_plain(replace(source, path=None)) for name, source in config.data.sources.items()}
    hardware = config.hardware
    facts = {
        "options": [stage, groups, config.seed, to_plain(config.launcher.environment)],
        "data": {**data, "sources": sources, "content": content_fingerprint(config.data)},
        "weights": weights,
        "ranks": [hardware.accelerator.name, hardware.nodes, hardware.gpus_per_node],
        "code": code,
    }
    return {name: _digest(fact) for name, fact in facts.items()}


def _digest(facts: Any) -> str:
    return hashlib.blake2b(json.dumps(facts, sort_keys=True, default=str).encode(), digest_size=10).hexdigest()


def _weights(directory: str, revision: str | None = None) -> Any:
    """A directory by its files, also one that is gone; a model of the hub by the commit that the cache has of it."""
    if Path(directory).is_dir() or Path(directory).is_absolute():
        return tree_digests(Path(directory))
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(directory, "config.json", revision=revision)
    # …/snapshots/COMMIT/config.json
    return [directory, Path(found).parent.name if isinstance(found, str) else revision]


def _function(reference: str | None) -> list[str | None]:
    """A function's name, and the hash of the file in which it is, if it is a user's own."""
    where, _, _ = (reference or "").rpartition(":")
    if where and not where.endswith(".py"):
        spec = importlib.util.find_spec(where)
        where = spec.origin or "" if spec is not None else ""
    return [reference, file_digest(Path(where)) if where and Path(where).is_file() else None]


def _model(model: ModelConfig) -> Any:
    """What a model's files are, but for one that is made from scratch."""
    if model.source is WeightSource.pretrained and model.path is not None:
        return _weights(model.path, model.revision)
    if model.source is WeightSource.gguf_package and model.gguf_file is not None:
        return file_digest(package_directory(model) / model.gguf_file)
    return None


@cache
def code_version() -> str:
    """Hash of this package's code and of the versions of the packages that compute."""
    digest = hashlib.blake2b(digest_size=10)
    for path in sorted((PROJECT / "rlhf").rglob("*.py")):
        digest.update(str(path.relative_to(PROJECT)).encode() + path.read_bytes())
    for package in _PACKAGES:
        try:
            digest.update(f"{package} {metadata.version(package)}".encode())
        except metadata.PackageNotFoundError:
            continue
    return digest.hexdigest()
