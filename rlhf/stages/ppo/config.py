"""Options of proximal policy optimisation."""

from dataclasses import dataclass

from rlhf.config.fields import option, option_factory
from rlhf.config.roles import Role, divisibility_problems
from rlhf.config.schema import OptimizerConfig, Schedule, StageConfig


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
    rollout_batch_size: int = option(128, "Prompts per rollout, over all ranks.", minimum=1)
    mini_batch_size: int = option(64, "Sequences per optimizer step, over all ranks.")
    micro_batch_size_per_gpu: int = option(
        0, "Sequences per forward and backward pass on one rank; 0: as many as divide the batch, up to 8.", minimum=0
    )
    ppo_epochs: int = option(1, "Passes over each rollout batch; it is shuffled for each of them.", minimum=1)
    kl_coef: float = option(0.05, "Weight of the per-token KL penalty (k1 estimator) in the reward.", minimum=0)
    kl_target: float | None = option(
        None, "KL per sequence that an adaptive kl_coef steers to; null keeps it fixed.", above=0
    )
    kl_horizon: int = option(
        10000, "Sequences over which the adaptive kl_coef reacts (Ziegler et al. 2019, section 2.2).", minimum=1
    )
    kl_budget: float = option(
        30.0, "KL per sequence, in nats, that the run is meant to stay under; beyond it there is a warning.", above=0
    )
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

    def roles(self) -> list[Role]:
        """Actor and critic are trained; reference and reward model are frozen."""
        optimizers = {"actor": self.optimizer, "critic": self.critic_optimizer, "reference": None, "reward_model": None}
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
        return found

    def schedule(self) -> list[str]:
        """Mini-batches, iterations and optimizer steps."""
        mini_batches = self.rollout_batch_size // max(1, self.mini_batch_size)
        steps = self.iterations * self.ppo_epochs * mini_batches
        return [
            f"{self.rollout_batch_size} prompts per rollout = {mini_batches} mini-batches of {self.mini_batch_size}, "
            f"{self.ppo_epochs} epochs each: {self.ppo_epochs * mini_batches} optimizer steps per iteration",
            f"{self.iterations} iterations: {self.iterations * self.rollout_batch_size} prompts and {steps} optimizer "
            f"steps; the schedule is {self.optimizer.schedule.name} over all of them",
        ]
