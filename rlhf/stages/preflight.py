"""What is done once before ranks start, and found again by each of them: tokenizer and data. Imports no torch."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rlhf.config.errors import ConfigError, DataError, listed
from rlhf.config.roles import roles_of
from rlhf.config.schema import Config, ModelConfig, SourceConfig, StageConfig, WeightSource
from rlhf.data.prepare import PreparedData, content_fingerprint, described_unread, prepare_data, training_texts
from rlhf.data.sources import source_module
from rlhf.data.split import PTX, STAGES
from rlhf.models.score_rule import score_tail
from rlhf.models.template import end_of_turn
from rlhf.models.tokenizer import load_tokenizer, prepare_tokenizer
from rlhf.planner.architecture import architecture_of
from rlhf.planner.memory import role_model, substages
from rlhf.stages.best_of_n.config import BestOfNConfig
from rlhf.stages.dpo.config import DPOConfig
from rlhf.stages.pipeline.config import PipelineConfig
from rlhf.stages.ppo.config import PPOConfig
from rlhf.stages.rm.config import RMConfig
from rlhf.stages.sft.config import SFTConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Preflight:
    """The prepared files of a stage. `reward_tokenizer_dir` is the tokenizer of the model that gives the scores."""

    cache_dir: Path
    tokenizer_dir: Path
    reward_tokenizer_dir: Path
    data: PreparedData

    @property
    def notes(self) -> list[str]:
        """What the user should know of the data, one sentence each."""
        counts = self.data.counts
        rows = {label: part["rows"] for label, part in counts["parts"].items()}
        stages = [f"{stage} {rows[f'{stage}_train']} + {rows[f'{stage}_held_out']} held out" for stage in STAGES]
        found = [f"data: {', '.join(stages)} (mode=data tells all)"]
        found += [f"data: {note}" for note in (*counts["choices"], *counts["mix"])]
        for what in ("dropped", "truncated"):
            if counts[what]:
                listed = ", ".join(f"{number} ({reason})" for reason, number in counts[what].items())
                found.append(f"data: {what}: {listed}; listed in {self.data.problems_file}")
        found += [f"data: {number} {note}" for note, number in counts["notes"].items()]
        for source, unread in counts["unread_by_source"].items():
            found.append(f"data: nobody reads of {source}: {described_unread(unread)}")
        told = "other programs give the model other tokens; model.chat_template sets another template"
        found += [f"warning: {finding}: {told}" for finding in counts["template"]]
        return [*found, *ends_told(load_tokenizer(self.tokenizer_dir))]


def ends_told(tokenizer: Any) -> list[str]:
    """Which token ends the answers that are trained on, where that is not the tokenizer's EOS, in one sentence."""
    end = end_of_turn(tokenizer)
    if end == tokenizer.eos_token_id:
        return []
    written = tokenizer.convert_ids_to_tokens(end)
    return [f"answers end with {written}, as the chat template writes it; {tokenizer.eos_token} (EOS) ends one, too"]


def cache_directory(config: Config) -> Path:
    """`cache_dir`, else $RLHF_CACHE, else ~/.cache/rlhf; absolute."""
    chosen = config.cache_dir or os.environ.get("RLHF_CACHE") or "~/.cache/rlhf"
    try:
        return Path(chosen).expanduser().resolve()
    except RuntimeError as error:  # Neither HOME nor an entry of this user in the system's list.
        raise ConfigError(
            f"cache_dir={chosen}: this user has no home directory: give cache_dir=DIR, or set HOME"
        ) from error


def _from_directory(directory: str, chat_template: str | None) -> ModelConfig:
    return ModelConfig(
        name=Path(directory).name, source=WeightSource.pretrained, path=directory, chat_template=chat_template
    )


def _models(config: Config) -> tuple[ModelConfig, ModelConfig]:
    """The model that a stage trains, and the one that the scores come from.

    A trained reward model reads texts in its own template, which is not the policy's where only that is given one.
    """
    stage = config.stage
    reward_model = config.reward_model if config.reward_model.name else config.model
    if isinstance(stage, RMConfig):
        model = _from_directory(stage.sft_model, reward_model.chat_template) if stage.sft_model else reward_model
        return model, model
    if isinstance(stage, DPOConfig):
        model = _from_directory(stage.actor_model, config.model.chat_template) if stage.actor_model else config.model
        return model, model
    if isinstance(stage, PPOConfig | BestOfNConfig):
        actor = _from_directory(stage.actor_model, config.model.chat_template) if stage.actor_model else config.model
        own = None if reward_model == config.model else reward_model.chat_template
        return actor, _from_directory(stage.reward_model, own) if stage.reward_model else reward_model
    return config.model, reward_model


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """The rows of a part that one global batch takes, and the option that says so."""

    part: str
    rows: int
    key: str


def _needs(stage: StageConfig, prefix: str = "stage") -> list[Need]:
    """The parts that a stage reads, and the rows of one global batch of each."""
    if isinstance(stage, PipelineConfig):
        inner = {"sft": stage.sft, "rm": stage.rm, "ppo": stage.ppo}
        return [need for name, each in inner.items() for need in _needs(each, f"{prefix}.{name}")]
    if isinstance(stage, SFTConfig):
        return [Need(part="sft", rows=stage.batch_size, key=f"{prefix}.batch_size={stage.batch_size}")]
    if isinstance(stage, RMConfig | DPOConfig):
        return [Need(part="rm", rows=stage.batch_size, key=f"{prefix}.batch_size={stage.batch_size}")]
    if isinstance(stage, PPOConfig):
        prompts = stage.rollout_batch_size // max(1, stage.group_size)
        needs = [Need(part="ppo", rows=prompts, key=f"{prefix}.rollout_batch_size={stage.rollout_batch_size}")]
        if stage.ptx_batch_size:
            needs.append(
                Need(part=PTX, rows=stage.ptx_batch_size, key=f"{prefix}.ptx.batch_size={stage.ptx_batch_size}")
            )
        return needs
    return [Need(part="ppo", rows=0, key=prefix)] if isinstance(stage, BestOfNConfig) else []


def size_problems(data: PreparedData, stage: StageConfig, prefix: str = "stage") -> Iterator[str]:
    """Yield the parts that a stage reads and that have no rows, or fewer than a batch, each with its option."""
    for need in _needs(stage, prefix):
        name = need.part
        if name == PTX and not data.has_part(PTX, held_out=False):
            name = "sft"  # Its answers are the pretraining mix of data without plain texts.
        try:
            if need.part != PTX:
                data.part(name, held_out=True)
            rows = len(data.part(name, held_out=False)) if need.rows else 0
        except DataError as error:
            yield str(error)
            continue
        if rows < need.rows:
            batch = f"one batch of {need.rows}" if need.part != "ppo" else f"the {need.rows} prompts of one rollout"
            yield (
                f"{need.key}: the training part of stage {name} has {rows} rows, fewer than {batch}: "
                f"lower it, raise data.split.{name} or add data"
            )


def check_sizes(data: PreparedData, stage: StageConfig, prefix: str = "stage") -> None:
    """Raise one DataError about all parts that are too small for a stage."""
    if problems := list(size_problems(data, stage, prefix)):
        raise DataError(listed(problems))


def _check_judge(config: Config) -> None:
    """Raise ConfigError if the judge that PPO will ask cannot be had."""
    if config.data.judge is None or not isinstance(config.stage, PPOConfig | BestOfNConfig | PipelineConfig):
        return
    module = source_module(config.data.judge, key="data.judge")
    if not hasattr(module, "judge_texts"):
        raise ConfigError(
            f"data.judge={config.data.judge}: this kind of source has no texts for a judge; set data.judge=null"
        )
    module.content_digest(SourceConfig(kind=config.data.judge), name="judge")


def check_stops(config: Config, tokenizer: Any) -> None:
    """Raise ConfigError for a stop token that the tokenizer does not have, or a stop text that no answer contains."""
    rollout, vocabulary = config.rollout, tokenizer.get_vocab()
    longest = rollout.max_new_tokens or config.data.max_response_length
    never = "no response would ever end with this text"
    for text in rollout.stop:
        ids = tokenizer.encode(text, add_special_tokens=False)
        spelt = tokenizer.decode(ids, skip_special_tokens=False)
        if text not in spelt:
            raise ConfigError(f"rollout.stop: the tokens of {text!r} read {spelt!r}: {never}")
        if len(ids) > longest + 2:  # The first and the last of them may be parts of longer tokens.
            raise ConfigError(f"rollout.stop: {text!r} has {len(ids)} tokens, an answer at most {longest}: {never}")
    unknown = [token for token in rollout.stop_tokens if token not in vocabulary]
    if unknown:
        raise ConfigError(
            f"rollout.stop_tokens={rollout.stop_tokens}: the tokenizer has no token {', '.join(unknown)}; texts of "
            "several tokens are for rollout.stop"
        )


def check_tail(config: Config, tokenizer: Any) -> None:
    """Raise ConfigError where what the chat template writes behind the longest answer does not fit a reward model.

    An answer that a text of rollout.stop ends is scored with EOS behind it.
    """
    tail = len(score_tail(tokenizer)) + bool(config.rollout.stop)
    response = max(config.rollout.max_new_tokens or 0, config.data.max_response_length)
    needed = config.data.max_prompt_length + response + tail
    for stage in substages(config.stage):
        for role in roles_of(config, stage):
            sizes = architecture_of(role_model(config, stage, role)) if role.scalar and role.name != "critic" else None
            if tail and sizes is not None and 0 < sizes.max_positions < needed:
                raise ConfigError(
                    f"data.max_response_length={config.data.max_response_length}: the longest answer with its prompt "
                    f"and the {tail} tokens behind it that are scored with it has {needed} tokens, but the reward "
                    f"model {sizes.max_positions} positions: lower data.max_prompt_length or data.max_response_length"
                )


def preflight(config: Config) -> Preflight:
    """What `prepare` does, and a check that every stage has the rows that it needs and can end its answers."""
    prepared = prepare(config)
    check_sizes(prepared.data, config.stage)
    check_tail(config, load_tokenizer(prepared.reward_tokenizer_dir))
    if (config.rollout.stop or config.rollout.stop_tokens) and not isinstance(config.stage, RMConfig):
        check_stops(config, load_tokenizer(prepared.tokenizer_dir))
    return prepared


def prepare(config: Config) -> Preflight:
    """Prepare tokenizers and data, or find them prepared; raises ConfigError or DataError for what the user can mend.

    Ranks call this again with the same configuration and get the same paths at once. For a pipeline the data are those
    of its first stage's tokenizer; where the reward model has a tokenizer of its own, its data are prepared as well.
    """
    cache_dir = cache_directory(config)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cache_dir={cache_dir} cannot be written: {error.strerror}; give another") from error
    prepare = partial(
        prepare_tokenizer,
        texts=lambda: training_texts(config.data),
        fingerprint=content_fingerprint(config.data),
        cache_dir=cache_dir,
    )
    _check_judge(config)
    model, reward_model = _models(config)
    tokenizer_dir = prepare(model)
    reward_tokenizer_dir = tokenizer_dir if reward_model == model else prepare(reward_model)
    data = prepare_data(config.data, tokenizer_dir=tokenizer_dir, cache_dir=cache_dir)
    if isinstance(config.stage, PipelineConfig) and reward_tokenizer_dir != tokenizer_dir:
        rewarded = prepare_data(config.data, tokenizer_dir=reward_tokenizer_dir, cache_dir=cache_dir)
        check_sizes(rewarded, config.stage.rm, "stage.rm")
    return Preflight(
        cache_dir=cache_dir, tokenizer_dir=tokenizer_dir, reward_tokenizer_dir=reward_tokenizer_dir, data=data
    )
