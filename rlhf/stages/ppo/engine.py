"""The four models of PPO as four DeepSpeed engines."""

import json
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.config.errors import ConfigError
from rlhf.config.roles import Role
from rlhf.config.schema import Config
from rlhf.engine.build import DTYPES, build_engine, partitioned_loading
from rlhf.engine.distributed import join, world_size
from rlhf.engine.heads import new_head
from rlhf.models.load import (
    ScalarModel,
    disable_dropout,
    has_scalar_head,
    load_causal_lm,
    load_scalar_model,
    vocabulary_limit,
)
from rlhf.models.lora import AdaptersOff
from rlhf.stages.ppo.config import PPOConfig
from rlhf.stages.session import adapt, enable_checkpointing


class DeepSpeedRLHFEngine:
    """Actor, reference, critic and reward model, each a DeepSpeed engine of its own.

    The actor and the reference start from the fine-tuned model, the critic and the reward model from the trained
    reward model (Ouyang et al. 2022, section 3.5 and appendix C.4).

    Args:
        actor_model_name_or_path: directory (or hub name) of the fine-tuned causal language model.
        critic_model_name_or_path: directory of the trained reward model.
        tokenizer: the actor's tokenizer, and the reward model's if `reward_tokenizer` is not given.
        reward_tokenizer: the reward model's tokenizer where it is another one. Answers are then scored by their text,
            and the critic, which values the actor's tokens, starts from the fine-tuned model with a new head.
        num_total_iters: optimizer steps of actor and critic: the length of their learning-rate schedules.
        args: the run's configuration; its stage is a `PPOConfig`. `memory.precision` must be resolved.

    Attributes:
        actor, reference, critic, reward: DeepSpeed engines; reference and reward are frozen.
        score_mean, score_std: statistics of the reward model's scores on reference responses.
        vocab_limit: number of logits that name tokens of the tokenizer.

    Raises:
        ConfigError: the reward model's directory holds no model with a scalar head.
    """

    def __init__(
        self,
        *,
        actor_model_name_or_path: str,
        critic_model_name_or_path: str,
        tokenizer: PreTrainedTokenizerBase,
        num_total_iters: int,
        args: Config,
        reward_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        join(timeout_minutes=args.launcher.timeout_minutes)
        self.args = args
        self.tokenizer, self.reward_tokenizer = tokenizer, reward_tokenizer
        self._total_steps = num_total_iters
        self._roles = {role.name: role for role in args.stage.roles()}
        reward_directory = Path(critic_model_name_or_path)
        if not has_scalar_head(reward_directory):
            raise ConfigError(
                f"{reward_directory} is not a reward model: train one with stage=rm and give its directory"
            )
        self.actor_model, self.actor = self._causal("actor", actor_model_name_or_path)
        # With its adapters off, an adapted actor is the model that it started from: no second copy is kept.
        adapted = args.lora.adapts(stage=args.stage.name, role="actor")
        self.reference = AdaptersOff(self.actor) if adapted else self._causal("reference", actor_model_name_or_path)[1]
        critic_start = critic_model_name_or_path if reward_tokenizer is None else actor_model_name_or_path
        self.critic_model, self.critic = self._scalar("critic", critic_start, tokenizer)
        self.reward_model, self.reward = self._scalar(
            "reward_model", critic_model_name_or_path, reward_tokenizer or tokenizer
        )
        self.vocab_limit = vocabulary_limit(self.actor_model, tokenizer)
        statistics = json.loads((reward_directory / "config.json").read_text(encoding="utf-8"))
        self.score_mean = float(statistics.setdefault("score_mean", 0.0))
        self.score_std = float(statistics.setdefault("score_std", 1.0))

    @property
    def stage(self) -> PPOConfig:
        """The PPO options."""
        return cast(PPOConfig, self.args.stage)

    def train(self) -> None:
        """Put actor and critic into training mode. Their dropout is off: the ratio must be 1 on the first pass."""
        self.actor.train()
        self.critic.train()

    def _causal(self, name: str, directory: str) -> tuple[PreTrainedModel, Any]:
        role, memory = self._roles[name], self.args.memory
        with partitioned_loading(role, memory=memory, ranks=world_size()):
            model = load_causal_lm(
                directory,
                self.tokenizer,
                dtype=DTYPES[memory.precision],
                attention=self.args.model.attention,
                revision=self.args.model.revision if directory == self.args.model.path else None,
            )
        disable_dropout(model)
        return model, self._engine(model, model, role)

    def _scalar(self, name: str, directory: str, tokenizer: PreTrainedTokenizerBase) -> tuple[ScalarModel, Any]:
        role, memory = self._roles[name], self.args.memory
        with partitioned_loading(role, memory=memory, ranks=world_size()):
            model = load_scalar_model(
                directory, tokenizer, dtype=DTYPES[memory.precision], attention=self.args.reward_model.attention
            )
        if not has_scalar_head(Path(directory)):
            new_head(model, seed=self.args.seed)
        disable_dropout(model)
        return model, self._engine(model, model.classifier, role)

    def _engine(self, module: Any, model: PreTrainedModel, role: Role) -> Any:
        if role.optimizer is not None:
            adapt(model, self.args, role)
        enable_checkpointing(model, role, memory=self.args.memory)
        return build_engine(module, role, memory=self.args.memory, ranks=world_size(), total_steps=self._total_steps)
