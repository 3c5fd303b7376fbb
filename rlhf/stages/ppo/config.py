"""Options of proximal policy optimisation."""

from dataclasses import dataclass

from rlhf.config.choices import KlPlacement, PtxMode
from rlhf.config.fields import option, option_factory
from rlhf.config.policy import EmaConfig, HealthConfig, PtxConfig
from rlhf.config.roles import Role, divisibility_problems
from rlhf.config.schema import OptimizerConfig, Schedule, StageConfig

# What the estimators of rlhf/rollout/advantages.py need: a critic, or groups of answers to the same prompt.
NEED_CRITIC = ("gae",)
NEED_GROUPS = ("grpo", "rloo")
ESTIMATORS = ("gae", "grpo", "reinforce_pp", "rloo")


def _constant_rate() -> OptimizerConfig:
    # The larger epsilon damps the first steps, when the second moments are still small (N+ implementation details).
    return OptimizerConfig(schedule=Schedule.constant, eps=1e-5)


@dataclass(kw_only=True, slots=True)
class PPOConfig(StageConfig):
    """Clipped policy optimisation with a KL penalty in the reward (Schulman et al. 2017; Ouyang et al. 2022)."""

    name: str = option("ppo", "The stage: a folder of rlhf/stages.")
    objective: str = option("eval/score", "The metric of the last evaluation that a sweep compares runs by.")
    actor_model: str | None = option(
        None, "Directory of the policy to start from; null starts from `model` (a pipeline fills in its SFT model)."
    )
    reward_model: str | None = option(None, "Directory of the trained reward model (a pipeline fills in its own).")
    iterations: int = option(100, "Rollouts, each followed by its updates.", minimum=1)
    rollout_batch_size: int = option(
        128, "Responses per rollout, over all ranks: to rollout_batch_size / group_size prompts.", minimum=1
    )
    group_size: int = option(1, "Responses to each prompt of a rollout.", minimum=1)
    advantage: str = option(
        "gae",
        "Advantage estimator: gae, grpo, rloo or reinforce_pp, or FILE.py:NAME or MODULE:NAME of a function of one "
        "rlhf.rollout.advantages.Signals that returns advantages and returns.",
    )
    critic: bool = option(True, "Whether there is a critic. gae needs one; a function of your own may.")
    mini_batch_size: int = option(64, "Sequences per optimizer step, over all ranks.")
    micro_batch_size_per_gpu: int = option(
        0, "Sequences per forward and backward pass on one rank; 0: as many as divide the batch, up to 8.", minimum=0
    )
    ppo_epochs: int = option(1, "Passes over each rollout batch; it is shuffled for each of them.", minimum=1)
    kl_coef: float = option(0.05, "Weight of the per-token KL penalty.", minimum=0)
    kl_placement: KlPlacement = option(
        KlPlacement.reward,
        "reward: the k1 estimate is taken off each token's reward. loss: the k2 estimate is added to each token's loss "
        "(the only one of the three whose gradient is that of the divergence).",
    )
    kl_target: float | None = option(
        None, "KL per sequence that an adaptive kl_coef steers to; null keeps it fixed.", above=0
    )
    kl_horizon: int = option(
        10000, "Sequences over which the adaptive kl_coef reacts (Ziegler et al. 2019, section 2.2).", minimum=1
    )
    kl_budget: float = option(30.0, "KL per sequence, in nats, that the run is meant to stay under.", above=0)
    clip_range: float = option(0.2, "The probability ratio is clipped to 1 ± clip_range.", above=0, maximum=1)
    dual_clip: float | None = option(
        None, "Bound of the loss for negative advantages (Ye et al. 2020: 3); null for none.", above=1
    )
    value_clip_range: float = option(0.2, "Values are clipped to the old values ± value_clip_range.", above=0)
    gamma: float = option(1.0, "Discount per token.", above=0, maximum=1)
    gae_lambda: float = option(
        0.95, "Lambda of generalised advantage estimation (Schulman et al. 2016).", minimum=0, maximum=1
    )
    whiten_advantages: bool = option(True, "Give the advantages zero mean and unit variance over all ranks.")
    critic_warmup_iterations: int = option(0, "First iterations in which only the critic is trained.", minimum=0)
    eval_every: int = option(
        25, "Iterations between evaluations; there is one before and one after in any case.", minimum=1
    )
    eval_prompts: int = option(128, "Held-out prompts per evaluation at most.", minimum=1)
    optimizer: OptimizerConfig = option_factory(_constant_rate, "Optimizer of the actor.")
    critic_optimizer: OptimizerConfig = option_factory(_constant_rate, "Optimizer of the critic.")
    ema: EmaConfig = option_factory(EmaConfig, "Average of the actor's weights.")
    ptx: PtxConfig = option_factory(PtxConfig, "Pretraining mix.")
    health: HealthConfig = option_factory(HealthConfig, "Health rules.")

    def roles(self) -> list[Role]:
        """Actor and critic (if there is one) are trained; reference and reward model are frozen."""
        optimizers = {"actor": self.optimizer, "critic": self.critic_optimizer, "reference": None, "reward_model": None}
        if not self.critic:
            del optimizers["critic"]
        return [
            Role(
                name=name,
                optimizer=optimizer,
                batch_size=self.mini_batch_size,
                micro_batch_size_per_gpu=self.micro_batch_size_per_gpu,
                model_key="model" if name in ("actor", "reference") else "reward_model",
                directory_key="actor_model" if name in ("actor", "reference") else "reward_model",
                scalar=name in ("critic", "reward_model"),
                generates=name == "actor",
                averaged=name == "actor" and self.ema.decay is not None,
                extra_batch_size=self.ptx_batch_size if name == "actor" else 0,
            )
            for name, optimizer in optimizers.items()
        ]

    def problems(self, prefix: str, ranks: int) -> list[str]:
        """Batch sizes that do not divide, and counts below one."""
        found = divisibility_problems(
            f"{prefix}.mini_batch_size", self.mini_batch_size, self.micro_batch_size_per_gpu, ranks
        )
        if self.mini_batch_size > 0 and self.rollout_batch_size % self.mini_batch_size:
            found.append(
                f"{prefix}.rollout_batch_size={self.rollout_batch_size} is not a multiple of "
                f"{prefix}.mini_batch_size={self.mini_batch_size}: a rollout is divided into whole mini-batches"
            )
        if self.group_size > 0 and self.rollout_batch_size % (self.group_size * ranks):
            found.append(
                f"{prefix}.rollout_batch_size={self.rollout_batch_size} is not a multiple of {prefix}.group_size × "
                f"ranks = {self.group_size} × {ranks}: each rank answers whole groups"
            )
        return [*found, *self._estimator_problems(prefix), *self._extras_problems(prefix, ranks)]

    def _estimator_problems(self, prefix: str) -> list[str]:
        found = []
        if ":" not in self.advantage and self.advantage not in ESTIMATORS:
            found.append(
                f"{prefix}.advantage={self.advantage}: there is no such estimator; there are {', '.join(ESTIMATORS)}, "
                "or give FILE.py:NAME or MODULE:NAME"
            )
        if self.advantage in NEED_CRITIC and not self.critic:
            found.append(f"{prefix}.critic=false: {prefix}.advantage={self.advantage} needs a critic's values")
        if self.advantage in NEED_GROUPS and self.group_size < 2:
            found.append(
                f"{prefix}.group_size={self.group_size}: {prefix}.advantage={self.advantage} compares the answers to "
                "one prompt; give 2 or more"
            )
        return found

    def _extras_problems(self, prefix: str, ranks: int) -> list[str]:
        found, steps = [], self.actor_steps
        if self.critic_warmup_iterations and not self.critic:
            found.append(f"{prefix}.critic_warmup_iterations={self.critic_warmup_iterations}: there is no critic")
        elif self.critic_warmup_iterations >= self.iterations:
            found.append(
                f"{prefix}.critic_warmup_iterations={self.critic_warmup_iterations}: the run has {self.iterations} "
                "iterations, so that the actor would never be trained"
            )
        if self.kl_target is not None and self.kl_coef == 0:
            found.append(f"{prefix}.kl_coef=0.0: an adaptive coefficient that begins at 0 stays 0")
        if self.ptx_batch_size % ranks:
            found.append(f"{prefix}.ptx.batch_size={self.ptx_batch_size} is not a multiple of the {ranks} ranks")
        if self.ema.decay is None and (self.ema.final_evaluation or self.ema.start_step):
            found.append(f"{prefix}.ema.decay=null: nothing is averaged; give a decay, as in 0.992, or leave ema out")
        elif self.ema.decay is not None and self.ema.start_step >= steps:
            found.append(
                f"{prefix}.ema.start_step={self.ema.start_step}: the actor has {steps} optimizer steps, so that "
                "nothing would be averaged"
            )
        if self.ptx.coef == 0 and (self.ptx.batch_size is not None or self.ptx.mode is not PtxMode.coef):
            found.append(f"{prefix}.ptx.coef=0.0: no pretraining text is mixed in; give a weight, or leave ptx out")
        return found

    @property
    def ptx_batch_size(self) -> int:
        """Sequences of pretraining text per optimizer step, over all ranks; 0 without a pretraining mix."""
        return 0 if self.ptx.coef == 0 else self.ptx.batch_size or self.mini_batch_size

    @property
    def steps_per_iteration(self) -> int:
        """Optimizer steps of an iteration."""
        return self.ppo_epochs * (self.rollout_batch_size // max(1, self.mini_batch_size))

    @property
    def actor_steps(self) -> int:
        """Optimizer steps of the actor, which rests while the critic warms up."""
        return (self.iterations - self.critic_warmup_iterations) * self.steps_per_iteration

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.iterations * self.steps_per_iteration

    def schedule(self) -> list[str]:
        """Mini-batches, iterations and optimizer steps."""
        mini_batches = self.rollout_batch_size // max(1, self.mini_batch_size)
        each = self.rollout_batch_size // max(1, self.group_size)
        answers = f" × {self.group_size} answers" if self.group_size > 1 else ""
        return [
            f"{each} prompts{answers} per rollout = {mini_batches} mini-batches of {self.mini_batch_size}, "
            f"{self.ppo_epochs} epochs each: {self.ppo_epochs * mini_batches} optimizer steps per iteration",
            f"{self.iterations} iterations: {self.iterations * each} prompts and {self.num_steps} optimizer "
            f"steps; the schedule is {self.optimizer.schedule.name} over all of them",
        ]
