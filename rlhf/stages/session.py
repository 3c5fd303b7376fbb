"""What every stage has at hand on a rank: device, tokenizer, data and the recorder."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from rlhf.config.files import read_yaml
from rlhf.config.roles import Role
from rlhf.config.schema import Config, MemoryConfig, ModelConfig
from rlhf.data.prepare import PreparedData
from rlhf.engine.build import DTYPES
from rlhf.engine.distributed import (
    all_reduce_max,
    all_reduce_sum,
    initialize_distributed,
    rank,
    seed_everything,
    world_size,
)
from rlhf.engine.update import StepResult
from rlhf.models.load import answer_ends
from rlhf.models.lora import add_adapters
from rlhf.models.prepare import prepare_base_model
from rlhf.models.tokenizer import load_tokenizer, tokenizer_digest
from rlhf.rollout.generate import Generator
from rlhf.rollout.sampling import Sampling
from rlhf.stages.preflight import check_stops, preflight
from rlhf.tracking.metrics import MetricAccumulator
from rlhf.tracking.recorder import Recorder
from rlhf.tracking.records import CONFIG
from rlhf.tracking.trackers import start_trackers


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """One rank's part of a stage's run. `reward_tokenizer` is the reward model's where it is another one."""

    config: Config
    run_dir: Path
    device: torch.device
    rank: int
    ranks: int
    dtype: torch.dtype
    tokenizer: PreTrainedTokenizerBase
    reward_tokenizer: PreTrainedTokenizerBase | None
    data: PreparedData
    base: str | None
    recorder: Recorder
    accumulator: MetricAccumulator
    _clock: dict[str, float] = field(default_factory=lambda: {"seconds": 0.0})

    def timing(self, tokens: float) -> dict[str, float]:
        """Seconds since the last call, evaluations left out, and the tokens of all ranks per second."""
        idle = ("evaluation", "samples", "export")
        busy = sum(seconds for phase, seconds in self.recorder.phases.items() if phase not in idle)
        seconds = max(busy - self._clock["seconds"], 1e-9)
        self._clock["seconds"] = busy
        return {"time/step": seconds, "time/tokens_per_second": tokens / seconds}

    def reduced_metrics(self) -> dict[str, float]:
        """The accumulated metrics over all ranks; the accumulator starts anew. Every rank must call."""
        return self.accumulator.flush(all_reduce_sum, all_reduce_max)

    @property
    def pad_id(self) -> int:
        """Id of the padding token."""
        return int(self.tokenizer.pad_token_id)

    def finish(self, *, before: dict[str, float], after: dict[str, float]) -> None:
        """Write the stage's summary."""
        self.recorder.summary(
            before=before,
            after=after,
            data={"fingerprint": self.data.fingerprint, "counts": self.data.counts},
            ranks=self.ranks,
            device=str(self.device),
            precision=self.config.memory.precision.name,
        )
        self.recorder.close()


def option_prefix(run_dir: Path, stage: str) -> str:
    """What a stage's options are called on the command line: stage, or stage.NAME in a pipeline."""
    whole = run_dir.parent / CONFIG
    if run_dir.name != stage or not whole.is_file():
        return "stage"
    inner = read_yaml(whole).get("stage", {}).get(stage)
    return f"stage.{stage}" if isinstance(inner, dict) else "stage"


def open_session(config: Config, run_dir: Path, *, base: ModelConfig | None) -> Session:
    """Load tokenizer and data (which launch.py has prepared), join the process group, and seed.

    `base` is the configured model that the stage starts from, or None if it starts from another stage's output;
    `Session.base` is then what `from_pretrained` takes for it. New and packaged models are built here, before the ranks
    join: in a process group transformers saves on rank 0 only, but each machine needs its own copy.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    prepared = preflight(config)
    tokenizer, reward_tokenizer = (
        load_tokenizer(directory) for directory in (prepared.tokenizer_dir, prepared.reward_tokenizer_dir)
    )
    base_path = (
        prepare_base_model(base, tokenizer, cache_dir=prepared.cache_dir, seed=config.seed)
        if base is not None
        else None
    )
    device = initialize_distributed(timeout_minutes=config.launcher.timeout_minutes)
    seed_everything(config.seed)
    is_main = rank() == 0
    trackers = start_trackers(
        config.tracking, run_dir=run_dir, stage=config.stage.name, config=asdict(config), is_main=is_main
    )
    return Session(
        config=config,
        run_dir=run_dir,
        device=device,
        rank=rank(),
        ranks=world_size(),
        dtype=DTYPES[config.memory.precision],
        tokenizer=tokenizer,
        reward_tokenizer=None
        if tokenizer_digest(reward_tokenizer) == tokenizer_digest(tokenizer)
        else reward_tokenizer,
        data=prepared.data,
        base=base_path,
        recorder=Recorder(run_dir, stage=config.stage.name, is_main=is_main, trackers=trackers, total_steps=0),
        accumulator=MetricAccumulator(device=device),
    )


def record_step(
    session: Session, result: StepResult, *, step: int, sources: Mapping[str, int], shown: Sequence[str]
) -> None:
    """Reduce the metrics of an optimizer step over the ranks, log them, and show those named. Every rank must call.

    The accumulator holds "train/tokens", the step's tokens on all ranks, beside what else was counted.
    """
    values = session.reduced_metrics()
    values |= {
        "train/learning_rate": result.learning_rate,
        "train/grad_norm": result.grad_norm,
        "train/skipped": float(not result.applied),
        **session.timing(values.pop("train/tokens")),
        **{f"data/{name}": float(count) for name, count in sources.items()},
    }
    session.recorder.metrics(step, values)
    told = {name: values[f"train/{name}"] for name in shown}
    session.recorder.progress(step, told, tokens_per_second=values["time/tokens_per_second"])


def count_steps(*, batches_per_epoch: int, epochs: float, max_steps: int | None) -> int:
    """Optimizer steps of a run: at least one, bounded by `max_steps`."""
    steps = max(1, round(batches_per_epoch * epochs))
    return steps if max_steps is None else min(steps, max_steps)


def adapt(model: PreTrainedModel, config: Config, role: Role) -> None:
    """Put adapters into a role's model, if the run's options say so. Before its engine is built."""
    rank = config.lora.rank_of(stage=config.stage.name, role=role.name)
    if rank is None:
        return
    chosen: ModelConfig = getattr(config, role.model_key)
    add_adapters(
        model,
        rank=rank,
        alpha=config.lora.alpha if config.lora.alpha is not None else 2.0 * rank,
        dropout=config.lora.dropout,
        targets=chosen.lora_targets if config.lora.targets is None else config.lora.targets,
        seed=config.seed,
        only_lora=config.lora.only_lora,
    )


def sampling_of(config: Config, tokenizer: PreTrainedTokenizerBase, *, ends: Sequence[int]) -> Sampling:
    """How responses are drawn; `ends` are ids that end one. Raises ConfigError for texts and tokens that end none."""
    check_stops(config, tokenizer)
    rollout, vocabulary = config.rollout, tokenizer.get_vocab()
    return Sampling(
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        min_p=rollout.min_p,
        repetition_penalty=rollout.repetition_penalty,
        stop_ids=tuple(dict.fromkeys([*ends, *(vocabulary[token] for token in rollout.stop_tokens)])),
        stop=tuple(rollout.stop),
        min_new_tokens=rollout.min_new_tokens,
        max_new_tokens=rollout.max_new_tokens or config.data.max_response_length,
        max_length=config.data.max_prompt_length + (rollout.max_new_tokens or config.data.max_response_length),
        batch_size=rollout.batch_size_per_gpu,
        backend=rollout.backend,
        gather=rollout.gather is not False,
        tensor_parallel=rollout.tensor_parallel or 1,
        release_cache=rollout.release_cache,
    )


def generator_of(config: Config, engine: Any, tokenizer: PreTrainedTokenizerBase, *, vocab_limit: int) -> Generator:
    """What answers prompts with an engine's weights in a run."""
    sampling = sampling_of(config, tokenizer, ends=answer_ends(engine.module))
    return Generator(engine=engine, tokenizer=tokenizer, sampling=sampling, vocab_limit=vocab_limit)


def global_count(session: Session, masks: Sequence[Tensor]) -> float:
    """True entries of the masks, over all ranks."""
    local = torch.stack([mask.sum() for mask in masks]).sum().to(session.device)
    return float(all_reduce_sum(local.float()))


def enable_checkpointing(model: Any, role: Role, *, memory: MemoryConfig) -> None:
    """Recompute activations in the backward pass, if the role's memory asks for it."""
    if memory.of_role(role.name, trained=role.optimizer is not None).gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
