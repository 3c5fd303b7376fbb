"""What scores a run's responses: its reward models as DeepSpeed engines, or a function of texts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.config.choices import Normalize
from rlhf.config.errors import ConfigError
from rlhf.config.roles import Role, roles_of
from rlhf.config.schema import REWARD_MODEL, Config, ScorerConfig
from rlhf.engine.build import DTYPES, partitioned_loading
from rlhf.engine.distributed import world_size
from rlhf.engine.heads import new_head
from rlhf.models.load import ScalarModel, disable_dropout, has_scalar_head, load_scalar_model
from rlhf.models.score_rule import ScoreRule, read_score_rule
from rlhf.models.tokenizer import load_tokenizer
from rlhf.rollout.score import RewardModelScorer, TextScorer, WeightedScorer
from rlhf.rollout.scorers import score_function
from rlhf.rollout.shaping import RunningMoments, Scorer, ScoreShaping
from rlhf.stages.policy import finish_engine


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardModel:
    """A frozen reward model: its engine, its weight in the score, and the rule that is stored with it."""

    engine: Any
    weight: float
    rule: ScoreRule


def load_reward_models(config: Config, first: str | None, tokenizer: PreTrainedTokenizerBase) -> list[RewardModel]:
    """The reward models that score: the one in the directory `first`, and those of `scorer.others`.

    `tokenizer` is that of all of them. Raises ConfigError for a directory without a reward model, or of another
    tokenizer.
    """
    if config.scorer.kind != REWARD_MODEL:
        return []
    roles = [role for role in roles_of(config, config.stage) if role.name.startswith(REWARD_MODEL)]
    weights = config.scorer.weights or [1.0] * len(roles)
    return [
        _load(config, role, str(role.path or first), tokenizer, weight=weight)
        for role, weight in zip(roles, weights, strict=True)
    ]


def _load(config: Config, role: Role, path: str, tokenizer: PreTrainedTokenizerBase, *, weight: float) -> RewardModel:
    if not has_scalar_head(Path(path)):
        raise ConfigError(f"{path} is not a reward model: train one with stage=rm and give its directory")
    if not load_tokenizer(Path(path)).get_vocab().items() <= tokenizer.get_vocab().items():
        whose = "the policy" if role.name == REWARD_MODEL else "the first reward model"
        raise ConfigError(
            f"{path} has another tokenizer than {whose}: it would score other text (in a loop of your own give "
            "reward_tokenizer=)"
        )
    rule = read_score_rule(Path(path), tokenizer, normalize=config.scorer.normalize is Normalize.model)
    _, engine = build_scalar(config, role, path, tokenizer, total_steps=1)
    return RewardModel(engine=engine, weight=weight, rule=rule)


def build_scalar(
    config: Config, role: Role, directory: str, tokenizer: PreTrainedTokenizerBase, *, total_steps: int
) -> tuple[ScalarModel, Any]:
    """A model with a scalar head in a role, without dropout, and its engine; one without a head gets a new one."""
    memory, chosen = config.memory, getattr(config, role.model_key)
    with partitioned_loading(role, memory=memory, ranks=world_size()):
        model = load_scalar_model(
            directory,
            tokenizer,
            dtype=DTYPES[memory.precision],
            attention=chosen.attention,
            revision=chosen.revision if directory == chosen.path else None,
        )
    if not has_scalar_head(Path(directory)):
        new_head(model, seed=config.seed)
    disable_dropout(model)
    return model, finish_engine(config, role, model, model.classifier, total_steps=total_steps)


def build_scorer(
    options: ScorerConfig,
    rewards: list[RewardModel],
    *,
    tokenizer: PreTrainedTokenizerBase,
    reward_tokenizer: PreTrainedTokenizerBase | None,
    micro_batch_size: int,
) -> Scorer:
    """The reward models, weighted, or the function of texts that the options name."""
    if options.kind != REWARD_MODEL:
        return TextScorer(function=score_function(options), name=f"scorer={options.kind}", tokenizer=tokenizer)
    members = tuple(
        (
            model.weight,
            RewardModelScorer(
                engine=model.engine,
                rule=model.rule,
                micro_batch_size=micro_batch_size,
                tokenizer=tokenizer,
                reward_tokenizer=reward_tokenizer,
            ),
        )
        for model in rewards
    )
    return WeightedScorer(members=members)


def build_shaping(options: ScorerConfig) -> ScoreShaping:
    """What is done to the scores."""
    return ScoreShaping(
        clip=options.clip,
        scale=options.scale,
        missing_eos_penalty=options.missing_eos_penalty,
        length_penalty=options.length_penalty,
        length_limit=options.length_limit,
        repetition_penalty=options.repetition_penalty,
        repetition_ngram=options.repetition_ngram,
        running=RunningMoments() if options.normalize is Normalize.running else None,
    )
