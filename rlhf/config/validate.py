"""All problems of a configuration at once, each with its key, its value and what would work."""

import functools
import importlib.util
import os
from collections.abc import Iterable, Iterator
from dataclasses import Field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from rlhf.config.errors import ConfigError, MissingExtraError
from rlhf.config.explain import did_you_mean
from rlhf.config.fields import LARGEST, demand
from rlhf.config.files import to_plain
from rlhf.config.model_directory import directory_faults
from rlhf.config.model_files import ModelFileError, read_object
from rlhf.config.origins import flat_values
from rlhf.config.schema import (
    REWARD_MODEL,
    Accelerator,
    Config,
    DataConfig,
    MemoryConfig,
    Mode,
    ModelConfig,
    OptimizerConfig,
    Precision,
    ScorerConfig,
    StageConfig,
    WeightSource,
)

_LONGEST_PATH = 3840  # Of the 4095 that there may be; a run's files have longer ones than its directory.
_PATHS = ("path", "run_dir", "cache_dir", "hostfile", "function", "others", "gguf_file")


def raise_problems(problems: Iterable[str]) -> None:
    """Raise one ConfigError that lists every problem, if there are any."""
    if found := list(problems):
        raise ConfigError(*found)


def value_problems(config: Config) -> list[str]:
    """The values that nothing can be computed from: texts that are no file names, and numbers beyond all bounds.

    Looked at before anything is derived from the configuration; with them, all other numbers that may not be.
    """
    texts = [*_texts(config)]
    numbers = [*_bounds(config)]
    beyond = any(abs(number) > LARGEST for number in _integers(to_plain(config))) or any(
        getattr(config.hardware, name) is not None and getattr(config.hardware, name) > most
        for name, most in (("nodes", 10_000), ("gpus_per_node", 1024))
    )
    return [*texts, *numbers] if texts or beyond else []


def _integers(value: Any) -> Iterator[int]:
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _integers(inner)
    elif isinstance(value, int):
        yield value


def _texts(config: Config) -> Iterator[str]:
    """Texts with null bytes or characters that are no Unicode, and names that no file system takes."""
    for key, value in flat_values(config):
        for text in _strings(value):
            name = key.rpartition(".")[2]
            shown = text if len(text) <= 80 else f"{text[:79]}…"
            if "\0" in text:
                yield f"{key}={shown!r}: holds a null byte"
            elif any("\ud800" <= character <= "\udfff" for character in text):
                yield f"{key}={shown!r}: is not UTF-8: give the file or directory another name"
            elif (name in _PATHS or name.endswith("_model")) and any(
                len(os.fsencode(p)) > 255 for p in text.split("/")
            ):
                yield f"{key}={shown}: a name in this path has more than 255 bytes"
            elif (name in _PATHS or name.endswith("_model")) and len(os.fsencode(text)) > _LONGEST_PATH:
                yield f"{key}={shown}: this path has more than {_LONGEST_PATH} bytes"
            elif key in ("model.name", "reward_model.name", "data.name") and (
                len(os.fsencode(text)) > 80 or "/" in text
            ):
                yield f"{key}={shown}: names a run directory: at most 80 bytes, without /"


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from _strings(inner)


def find_problems(config: Config) -> Iterator[str]:
    """Yield every problem of a resolved configuration, each beginning with its key and value."""
    same = config.reward_model == config.model
    yield from _bounds(replace(config, reward_model=ModelConfig()) if same else config)
    if config.memory.precision is Precision.fp16 and config.hardware.accelerator is Accelerator.cpu:
        yield "memory.precision=fp16: CPUs compute in bf16 or fp32; use memory.precision=auto"
    frozen = {role.name for role in config.stage.roles() if role.optimizer is None}
    yield from _roles_memory(config.memory, frozen_actor="actor" in frozen)
    ranks = max(1, (config.hardware.gpus_per_node or 1) * config.hardware.nodes)
    yield from config.stage.problems("stage", ranks)
    by_model = config.scorer.kind == REWARD_MODEL
    yield from _stage(config.stage, "stage", mode=config.mode, scored=by_model)
    yield from _scorer(config.scorer)
    yield from _model(config.model, "model", mode=config.mode)
    if config.reward_model != config.model:
        yield from _model(config.reward_model, "reward_model", mode=config.mode)
    yield from _lora(config)
    yield from _data(config.data)
    if config.tracking.wandb and importlib.util.find_spec("wandb") is None:
        yield "tracking.wandb=true needs the package wandb: run  pip install wandb -c constraints.txt"


@functools.cache
def _fields(kind: Any) -> "tuple[Field[Any], ...]":
    return fields(kind)


def _bounds(config: Any, prefix: str = "") -> Iterator[str]:
    """Numbers that are not what their fields may be."""
    kind: Any = type(config)
    for entry in _fields(kind):
        value = getattr(config, entry.name)
        if isinstance(value, int | float):
            if wanted := demand(entry, value):
                yield f"{prefix}{entry.name}={value}: must be {wanted}"
        elif isinstance(value, dict):
            for name, inner in value.items():
                if is_dataclass(inner):
                    yield from _bounds(inner, f"{prefix}{entry.name}.{name}.")
        elif is_dataclass(value):
            yield from _bounds(value, f"{prefix}{entry.name}.")


def _roles_memory(memory: MemoryConfig, *, frozen_actor: bool) -> Iterator[str]:
    for name in ("reference", "reward_model", *(["actor"] if frozen_actor else [])):
        stage = getattr(memory, name).zero_stage
        if stage in (1, 2):
            yield f"memory.{name}.zero_stage={stage}: a model without an optimizer has ZeRO stage 0 or 3"
        if getattr(memory, name).offload_optimizer:
            yield f"memory.{name}.offload_optimizer=true: a model without an optimizer has no optimizer states"
    for name in ("actor", "critic", "reference", "reward_model"):
        own = getattr(memory, name)
        placed = memory.of_role(name, trained=name in ("actor", "critic"))
        if own.offload_parameters and placed.zero_stage < 3:
            yield f"memory.{name}.offload_parameters=true: needs ZeRO stage 3 for that role, not {placed.zero_stage}"
        if own.offload_optimizer and placed.zero_stage == 0 and name in ("actor", "critic"):
            yield f"memory.{name}.offload_optimizer=true: needs ZeRO stage 1, 2 or 3 for that role, not 0"
    if memory.offload_parameters and (memory.zero_stage or 0) < 3:
        yield f"memory.offload_parameters=true: needs memory.zero_stage=3, not {memory.zero_stage}"
    if memory.offload_optimizer and memory.zero_stage == 0:
        yield "memory.offload_optimizer=true: needs memory.zero_stage=1, 2 or 3, not 0"


def _scorer(scorer: ScorerConfig) -> Iterator[str]:
    for path in scorer.others:
        yield from _model_directory(path, "scorer.others", scored=True)
    if scorer.kind != REWARD_MODEL and (scorer.others or scorer.weights):
        yield f"scorer.kind={scorer.kind}: asks no reward model; leave scorer.others and scorer.weights out"
    elif scorer.weights and len(scorer.weights) != 1 + len(scorer.others):
        yield (
            f"scorer.weights={scorer.weights}: give {1 + len(scorer.others)} weights, of the stage's reward model and "
            "of each of scorer.others, or none"
        )


def _lora(config: Config) -> Iterator[str]:
    lora = config.lora
    known = ("sft", "rm", "actor", "critic")
    for role in lora.roles:
        if role not in known:
            yield f"lora.roles={lora.roles}: there is no role {role}{did_you_mean(role, known)}"
    trained = set(_trained(config.stage))
    yield from _own_ranks(config, trained)
    ranks = {name: lora.rank_of(stage=name, role=name) for name in known if name in trained}
    if not any(ranks.values()):
        unused = {"only_lora=false": not lora.only_lora, f"learning_rate={lora.learning_rate}": lora.learning_rate}
        none = lora.rank is None
        how = (
            "give lora.rank, too"
            if none
            else f"lora.roles={lora.roles} leaves out what stage={config.stage.name} trains"
        )
        for option in (option for option, given in unused.items() if given):
            yield f"lora.{option}: there are no adapters, so that all weights are trained; {how}"
    for key, model in {"model": config.model, "reward_model": config.reward_model}.items():
        mine = ("sft", "actor") if key == "model" else ("rm", "critic")
        used = {name: rank for name in mine if (rank := lora.rank_of(stage=name, role=name)) is not None}
        if lora.targets is None and not model.lora_targets and used:
            yield (
                f"lora.rank={max(used.values())}: {key}={model.name} names no layers to adapt: give some, as in  "
                f"lora.targets=[q_proj,v_proj], or leave {', '.join(sorted(used))} out of lora.roles"
            )
    if lora.dropout > 0 and any(ranks.values()) and "actor" in trained:
        yield f"lora.dropout={lora.dropout}: PPO and DPO need 0: passes of the same policy must agree"


def _own_ranks(config: Config, trained: set[str]) -> Iterator[str]:
    """Ranks for models that the run does not train, or does not adapt."""
    lora = config.lora
    for key, name, called in (("critic_rank", "critic", "critic"), ("rm_rank", "rm", "reward model")):
        rank = getattr(lora, key)
        if rank is not None and name not in trained:
            yield f"lora.{key}={rank}: stage={config.stage.name} trains no {called}; leave it out"
        elif (rank or 0) > 0 and name not in lora.roles:
            yield f"lora.{key}={rank}: lora.roles={lora.roles} leaves {name} out; add it, or leave lora.{key} out"


def _trained(stage: StageConfig) -> Iterator[str]:
    """What a stage, or a pipeline, trains, by the names of lora.roles."""
    for entry in fields(stage):
        if isinstance(value := getattr(stage, entry.name), StageConfig):
            yield from _trained(value)
    for role in stage.roles():
        if role.optimizer is not None:
            yield stage.name if role.name == "model" else role.name


def _stage(stage: StageConfig, prefix: str, *, mode: Mode, scored: bool) -> Iterator[str]:
    """Optimizers and model directories, also those of a pipeline's stages."""
    inside = prefix != "stage"
    for entry in fields(stage):
        key, value = f"{prefix}.{entry.name}", getattr(stage, entry.name)
        if isinstance(value, StageConfig):
            yield from _stage(value, key, mode=mode, scored=scored)
        elif isinstance(value, OptimizerConfig):
            yield from _optimizer(value, key)
        elif not entry.name.endswith("_model"):
            continue
        elif isinstance(value, str) and inside:
            yield f"{key}={value}: a pipeline fills this in itself; leave it out, or run  stage={stage.name}  alone"
        elif isinstance(value, str):
            yield from _model_directory(value, key, scored=entry.name == "reward_model")
        elif entry.name == "reward_model" and mode is Mode.run and not inside and scored:
            yield (
                f"{key} is not set: stage={stage.name} needs a trained reward model, as in  {key}=RUN/rm/model  "
                "(stage=rm trains one; stage=pipeline does everything)"
            )


def _optimizer(optimizer: OptimizerConfig, key: str) -> Iterator[str]:
    if len(optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in optimizer.betas):
        yield f"{key}.betas={optimizer.betas}: must be two numbers from 0 up to below 1, as in [0.9,0.95]"


def _model_directory(path: str, key: str, *, scored: bool = False) -> Iterator[str]:
    """Whether a directory holds a language model, or with `scored` one that ends in a single number."""
    directory = Path(path)
    if not os.path.isdir(directory):
        if os.path.lexists(directory):
            kind = "a link that leads nowhere" if not os.path.exists(directory) else "a file"
            yield f"{key}={path}: is {kind}, no directory with a model"
            return
        siblings = [entry.name for entry in directory.parent.iterdir()] if directory.parent.is_dir() else []
        yield f"{key}={path}: there is no such directory{_nearest(directory.name, siblings)}"
        return
    if not os.path.lexists(directory / "config.json"):
        hint = f"; did you mean {directory / 'model'}?" if (directory / "model" / "config.json").is_file() else ""
        yield f"{key}={path}: holds no config.json, so it is not a Hugging Face model directory{hint}"
        return
    faults = directory_faults(directory)
    yield from (f"{key}: {fault}" for fault in faults)
    try:
        entries = read_object(directory / "config.json")
    except ModelFileError:
        return
    architectures = entries.get("architectures")
    architectures = architectures if isinstance(architectures, list) else []
    labels = entries.get("id2label")
    classifies = any("SequenceClassification" in str(name) for name in architectures)
    if scored and not classifies:
        yield f"{key}={path}: is not a reward model but {_listed(architectures)}: train one with stage=rm"
    elif scored and isinstance(labels, dict) and len(labels) > 1:
        yield f"{key}={path}: tells {len(labels)} classes apart; a reward model gives one number"
    elif not scored and classifies:
        yield f"{key}={path}: is a reward model ({_listed(architectures)}), which cannot write: give a language model"


def _listed(names: list[Any]) -> str:
    return ", ".join(str(name) for name in names) or "a model without an architecture"


def _model(model: ModelConfig, key: str, *, mode: Mode) -> Iterator[str]:
    if not model.name:
        yield f"{key}.* is set but no model is chosen: add  {'model@' if key == 'reward_model' else ''}{key}=NAME"
    elif model.source is WeightSource.scratch:
        yield from _scratch(model, key)
    elif model.source is WeightSource.gguf_package:
        if not model.package or not model.gguf_file:
            yield f"{key}.source=gguf_package: needs {key}.package and {key}.gguf_file"
        elif mode is Mode.run and importlib.util.find_spec(model.package) is None:
            package = model.package.replace("_", "-")
            yield str(MissingExtraError(package, model.extra or model.name, f"{key}={model.name}"))
    elif not model.path:
        # A model whose sizes are known can be planned without its weights.
        if mode is Mode.run or model.architecture.family is None:
            yield f"{key}.path is not set: give a directory, or ORG/NAME on the Hugging Face hub, as in  {key}.path=DIR"
    elif Path(model.path).is_absolute():
        yield from _model_directory(model.path, f"{key}.path")


def _scratch(model: ModelConfig, key: str) -> Iterator[str]:
    scratch = model.scratch
    if scratch.num_heads < 1 or scratch.hidden_size < 1:
        return  # Said already.
    if scratch.hidden_size % scratch.num_heads:
        fitting = [heads for heads in range(1, scratch.hidden_size + 1) if scratch.hidden_size % heads == 0]
        nearest = min(fitting, key=lambda heads: abs(heads - scratch.num_heads))
        yield (
            f"{key}.scratch.num_heads={scratch.num_heads} does not divide "
            f"{key}.scratch.hidden_size={scratch.hidden_size}: {nearest} heads would"
        )


def _data(data: DataConfig) -> Iterator[str]:
    if not data.sources:
        yield "data.sources is empty: choose a mix, as in  data=film_reviews, or give a source"
    shares = {name: getattr(data.split, name) for name in ("sft", "rm", "ppo")}
    if sum(shares.values()) <= 0:
        yield "data.split: at least one of sft, rm and ppo must be above 0"
    if not 0 < data.split.held_out < 1:
        yield f"data.split.held_out={data.split.held_out}: must be above 0 and below 1, as in 0.05"
    if data.judge is not None and importlib.util.find_spec("sklearn") is None:
        yield str(MissingExtraError("scikit-learn", "demo", f"data.judge={data.judge}"))


def _nearest(name: str, names: list[str]) -> str:
    hint = did_you_mean(name, names)
    return hint if "did you mean" in hint else ""
