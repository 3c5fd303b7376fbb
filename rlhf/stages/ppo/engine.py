"""The four models of PPO as four DeepSpeed engines."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.config.errors import ConfigError
from rlhf.config.roles import roles_of
from rlhf.config.schema import Config, Precision
from rlhf.engine.distributed import join, rank, seed_everything, world_size
from rlhf.engine.ema import WeightAverage
from rlhf.engine.export import export_model
from rlhf.models.load import vocabulary_limit
from rlhf.models.lora import AdaptersOff
from rlhf.stages.policy import build_causal
from rlhf.stages.ppo.config import PPOConfig
from rlhf.stages.scoring import build_scalar, load_reward_models


def check_resolved(config: Config, *, ranks: int) -> None:
    """Raise ConfigError for what launch.py would have refused or filled in."""
    problems = config.stage.problems("stage", ranks)
    if config.memory.zero_stage is None or config.memory.precision is Precision.auto:
        problems.append("memory.zero_stage and memory.precision: say which, as in MemoryConfig(zero_stage=1, …)")
    if problems:
        raise ConfigError(*problems)


class DeepSpeedRLHFEngine:
    """Actor, reference, critic and reward models, each a DeepSpeed engine of its own.

    The actor and the reference start from the fine-tuned model, the critic and the reward model from the trained
    reward model (Ouyang et al. 2022, section 3.5 and appendix C.4).

    Args:
        actor_model_name_or_path: directory (or hub name) of the fine-tuned causal language model.
        critic_model_name_or_path: directory of the trained reward model. None where something else scores: the critic
            then starts from the fine-tuned model with a new head.
        tokenizer: the actor's tokenizer, and the reward model's if `reward_tokenizer` is not given.
        reward_tokenizer: the reward model's tokenizer where it is another one. Answers are then scored by their text,
            and the critic, which values the actor's tokens, starts from the fine-tuned model with a new head.
        num_total_iters: optimizer steps of actor and critic: the length of their learning-rate schedules.
        args: the run's configuration; its stage is a `PPOConfig`. `memory.precision` must be resolved.

    Attributes:
        actor, reference, critic: DeepSpeed engines; the reference is frozen, and the critic None if there is none.
        average: the average of the actor's weights, None without `stage.ema.decay`.
        rewards: the reward models; the first one is that of `critic_model_name_or_path`.
        rank, world_size: this process's place among the ranks.
        vocab_limit: number of logits that name tokens of the tokenizer.

    Raises:
        ConfigError: a reward model's directory holds no model with a scalar head.
    """

    def __init__(
        self,
        *,
        actor_model_name_or_path: str,
        critic_model_name_or_path: str | None,
        tokenizer: PreTrainedTokenizerBase,
        num_total_iters: int,
        args: Config,
        reward_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        join(timeout_minutes=args.launcher.timeout_minutes)
        self.rank, self.world_size = rank(), world_size()
        self.args = args
        check_resolved(args, ranks=self.world_size)
        self.tokenizer, self.reward_tokenizer = tokenizer, reward_tokenizer
        # The actor's schedule ends with its own last step: it rests while the critic warms up.
        resting = self.stage.critic_warmup_iterations * self.stage.steps_per_iteration
        self._actor_steps = max(1, num_total_iters - resting)
        self._roles = {role.name: role for role in roles_of(args, args.stage)}
        self.actor_model, self.actor = self._causal("actor", actor_model_name_or_path)
        # With its adapters off, an adapted actor is the model that it started from: no second copy is kept.
        adapted = "reference" not in self._roles
        self.reference = AdaptersOff(self.actor) if adapted else self._causal("reference", actor_model_name_or_path)[1]
        own_critic = critic_model_name_or_path is None or reward_tokenizer is not None
        start = actor_model_name_or_path if own_critic else critic_model_name_or_path
        self.critic: Any = None
        if "critic" in self._roles:
            role = self._roles["critic"]
            self.critic_model, self.critic = build_scalar(
                args,
                replace(role, model_key="model") if own_critic else role,
                str(start),
                tokenizer,
                total_steps=num_total_iters,
            )
        self.rewards = load_reward_models(args, critic_model_name_or_path, reward_tokenizer or tokenizer)
        self.vocab_limit = vocabulary_limit(self.actor_model, tokenizer)
        ema = self.stage.ema
        # Building models draws different numbers on the ranks.
        seed_everything(args.seed + self.rank)
        self.average = (
            WeightAverage(self.actor, decay=ema.decay, start_step=ema.start_step) if ema.decay is not None else None
        )

    @property
    def stage(self) -> PPOConfig:
        """The PPO options."""
        return cast(PPOConfig, self.args.stage)

    def train(self) -> None:
        """Put actor and critic into training mode. Their dropout is off: the ratio must be 1 on the first pass."""
        self.actor.train()
        if self.critic is not None:
            self.critic.train()

    def save(self, directory: str | Path) -> None:
        """Write the actor as a Hugging Face model directory, its tokenizer included. Every rank must call.

        Adapters are written beside it, to DIRECTORY-adapter. A model that is there is replaced. Raises ConfigError if
        the directory holds anything else.
        """
        target = Path(directory).absolute()
        if target.exists() and not (target / "config.json").is_file() and any(target.iterdir()):
            raise ConfigError(f"{target} is no model: it would be replaced; give another directory")
        beside = target.with_name(f"{target.name}-adapter")
        export_model(self.actor, self.actor_model, self.tokenizer, target, adapter_directory=beside)

    def _causal(self, name: str, directory: str) -> tuple[PreTrainedModel, Any]:
        return build_causal(self.args, self._roles[name], directory, self.tokenizer, total_steps=self._actor_steps)
