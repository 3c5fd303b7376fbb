"""All problems of a configuration at once, each with its key, its value and what would work."""

import importlib.util
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from rlhf.config.errors import ConfigError, MissingExtraError
from rlhf.config.explain import did_you_mean
from rlhf.config.schema import (
    Accelerator,
    Config,
    DataConfig,
    HardwareConfig,
    MemoryConfig,
    Mode,
    ModelConfig,
    OptimizerConfig,
    Precision,
    RolloutConfig,
    SourceConfig,
    StageConfig,
    WeightSource,
)


def validate(config: Config, *, gpus: int) -> None:
    """Raise one ConfigError that lists every problem of a resolved configuration; `gpus` is how many there are."""
    problems = list(find_problems(config, gpus=gpus))
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise ConfigError(f"{len(problems)} problems in the configuration:\n{listed}")


def find_problems(config: Config, *, gpus: int) -> Iterator[str]:
    """Yield every problem of a resolved configuration."""
    yield from _hardware(config.hardware, gpus=gpus)
    yield from _memory(config.memory, config.hardware)
    ranks = max(1, (config.hardware.gpus_per_node or 1) * config.hardware.nodes)
    yield from config.stage.problems("stage", ranks)
    yield from _stage(config.stage, "stage", mode=config.mode)
    yield from _model(config.model, "model")
    if config.reward_model != config.model:
        yield from _model(config.reward_model, "reward_model")
    yield from _data(config.data)
    yield from _rollout(config.rollout)
    yield from _lengths(config)
    if config.scorer.clip is not None and config.scorer.clip <= 0:
        yield f"scorer.clip={config.scorer.clip}: must be above 0, or null for no clipping"
    if config.tracking.wandb and importlib.util.find_spec("wandb") is None:
        yield "tracking.wandb=true needs the package wandb: run  pip install wandb -c constraints.txt"
    if config.launcher.timeout_minutes <= 0:
        yield f"launcher.timeout_minutes={config.launcher.timeout_minutes}: must be above 0"
    port = config.launcher.master_port
    if port is not None and not 1024 <= port <= 65535:
        yield f"launcher.master_port={port}: must be between 1024 and 65535, or null for a free one"


def _hardware(hardware: HardwareConfig, *, gpus: int) -> Iterator[str]:
    ranks = hardware.gpus_per_node
    if hardware.nodes != 1:
        yield f"hardware.nodes={hardware.nodes}: ranks are started on this machine only, so it must be 1"
    if hardware.accelerator is Accelerator.cuda and gpus == 0:
        yield "hardware.accelerator=cuda: no GPU was found that the installed torch can use; use hardware=cpu"
    elif ranks is not None and ranks < 1:
        yield f"hardware.gpus_per_node={ranks}: must be at least 1"
    elif hardware.accelerator is Accelerator.cuda and ranks is not None and ranks > gpus:
        yield f"hardware.gpus_per_node={ranks}: this machine has {gpus} usable GPUs; set it to {gpus} or fewer"
    if hardware.threads_per_rank is not None and hardware.threads_per_rank < 1:
        yield f"hardware.threads_per_rank={hardware.threads_per_rank}: must be at least 1, or null to divide the cores"


def _memory(memory: MemoryConfig, hardware: HardwareConfig) -> Iterator[str]:
    if not 0 <= memory.zero_stage <= 3:
        yield f"memory.zero_stage={memory.zero_stage}: must be 0, 1, 2 or 3, as in  memory=zero1"
    if memory.precision is Precision.fp16 and hardware.accelerator is Accelerator.cpu:
        yield "memory.precision=fp16: CPUs compute in bf16 or fp32; use memory.precision=auto"


def _stage(stage: StageConfig, prefix: str, *, mode: Mode) -> Iterator[str]:
    """Optimizers and model directories, also those of a pipeline's stages."""
    inside = prefix != "stage"
    for entry in fields(stage):
        key, value = f"{prefix}.{entry.name}", getattr(stage, entry.name)
        if isinstance(value, StageConfig):
            yield from _stage(value, key, mode=mode)
        elif isinstance(value, OptimizerConfig):
            yield from _optimizer(value, key)
        elif not entry.name.endswith("_model"):
            continue
        elif isinstance(value, str) and inside:
            yield f"{key}={value}: a pipeline fills this in itself; leave it out, or run  stage={stage.name}  alone"
        elif isinstance(value, str):
            yield from _model_directory(value, key)
        elif entry.name == "reward_model" and mode is Mode.run and not inside:
            yield (
                f"{key} is not set: stage={stage.name} needs a trained reward model, as in  {key}=RUN/rm/model  "
                "(stage=rm trains one; stage=pipeline does everything)"
            )


def _optimizer(optimizer: OptimizerConfig, key: str) -> Iterator[str]:
    if optimizer.learning_rate <= 0:
        yield f"{key}.learning_rate={optimizer.learning_rate}: must be above 0"
    if len(optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in optimizer.betas):
        yield f"{key}.betas={optimizer.betas}: must be two numbers from 0 up to below 1, as in [0.9,0.95]"
    for name in ("warmup_ratio", "final_ratio"):
        if not 0 <= getattr(optimizer, name) <= 1:
            yield f"{key}.{name}={getattr(optimizer, name)}: must be between 0 and 1"
    for name in ("eps", "weight_decay", "max_grad_norm"):
        if getattr(optimizer, name) < 0:
            yield f"{key}.{name}={getattr(optimizer, name)}: must not be negative"


def _model_directory(path: str, key: str) -> Iterator[str]:
    directory = Path(path)
    if not directory.is_dir():
        siblings = [entry.name for entry in directory.parent.iterdir()] if directory.parent.is_dir() else []
        yield f"{key}={path}: there is no such directory{_nearest(directory.name, siblings)}"
    elif not (directory / "config.json").is_file():
        hint = f"; did you mean {directory / 'model'}?" if (directory / "model" / "config.json").is_file() else ""
        yield f"{key}={path}: holds no config.json, so it is not a Hugging Face model directory{hint}"


def _model(model: ModelConfig, key: str) -> Iterator[str]:
    if not model.name:
        yield f"{key}.* is set but no model is chosen: add  {'model@' if key == 'reward_model' else ''}{key}=NAME"
    elif model.source is WeightSource.scratch:
        yield from _scratch(model, key)
    elif model.source is WeightSource.gguf_package:
        if not model.package or not model.gguf_file:
            yield f"{key}.source=gguf_package: needs {key}.package and {key}.gguf_file"
        elif importlib.util.find_spec(model.package) is None:
            package = model.package.replace("_", "-")
            yield str(MissingExtraError(package, model.extra or model.name, f"{key}={model.name}"))
    elif not model.path:
        yield f"{key}.path is not set: give a directory, or ORG/NAME on the Hugging Face hub, as in  {key}.path=DIR"
    elif Path(model.path).is_absolute():
        yield from _model_directory(model.path, f"{key}.path")


def _scratch(model: ModelConfig, key: str) -> Iterator[str]:
    scratch = model.scratch
    for name in ("num_layers", "hidden_size", "num_heads", "intermediate_size", "vocab_size", "max_positions"):
        if getattr(scratch, name) < 1:
            yield f"{key}.scratch.{name}={getattr(scratch, name)}: must be at least 1"
            return
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
    for name, source in data.sources.items():
        yield from _source(source, f"data.sources.{name}")
    shares = {name: getattr(data.split, name) for name in ("sft", "rm", "ppo")}
    for name, share in shares.items():
        if share < 0:
            yield f"data.split.{name}={share}: a share must not be negative"
    if sum(shares.values()) <= 0:
        yield "data.split: at least one of sft, rm and ppo must be above 0"
    if not 0 < data.split.held_out < 1:
        yield f"data.split.held_out={data.split.held_out}: must be above 0 and below 1, as in 0.05"
    for name in ("max_prompt_length", "max_response_length"):
        if getattr(data, name) < 1:
            yield f"data.{name}={getattr(data, name)}: must be at least 1"
    if data.judge is not None and importlib.util.find_spec("sklearn") is None:
        yield str(MissingExtraError("scikit-learn", "demo", f"data.judge={data.judge}"))


def _source(source: SourceConfig, key: str) -> Iterator[str]:
    if source.weight is not None and source.weight <= 0:
        yield f"{key}.weight={source.weight}: must be above 0, or null to use every row"
    if source.opening_words < 1:
        yield f"{key}.opening_words={source.opening_words}: must be at least 1"
    if source.kind != "file":
        return
    if not source.path:
        yield f"{key}.path is not set: give a JSON-lines file, as in  {key}.path=FILE.jsonl"
    elif not Path(source.path).exists():
        folder = Path(source.path).parent
        names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        yield f"{key}.path={source.path}: there is no such file{_nearest(Path(source.path).name, names)}"


def _nearest(name: str, names: list[str]) -> str:
    hint = did_you_mean(name, names)
    return hint if "did you mean" in hint else ""


def _rollout(rollout: RolloutConfig) -> Iterator[str]:
    if rollout.temperature <= 0:
        yield f"rollout.temperature={rollout.temperature}: must be above 0, because PPO samples"
    if not 0 < rollout.top_p <= 1:
        yield f"rollout.top_p={rollout.top_p}: must be above 0 and at most 1"
    if rollout.top_k < 0:
        yield f"rollout.top_k={rollout.top_k}: must be 0 (all tokens) or more"
    for name in ("max_new_tokens", "batch_size_per_gpu"):
        value = getattr(rollout, name)
        if value is not None and value < 1:
            yield f"rollout.{name}={value}: must be at least 1, or null"


def _lengths(config: Config) -> Iterator[str]:
    """Prompt and response must fit into the positions of a model that is created here."""
    response = max(config.rollout.max_new_tokens or 0, config.data.max_response_length)
    longest = config.data.max_prompt_length + response
    models = {"model": config.model, "reward_model": config.reward_model}
    if config.reward_model == config.model:
        del models["reward_model"]
    for key, model in models.items():
        if model.source is WeightSource.scratch and longest > model.scratch.max_positions:
            yield (
                f"{key}.scratch.max_positions={model.scratch.max_positions} is too short for a prompt of "
                f"{config.data.max_prompt_length} and a response of {response} tokens: set it to {longest} or more, "
                "or lower data.max_prompt_length or data.max_response_length"
            )
