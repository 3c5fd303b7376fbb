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
    actor_model: str | None = option(
        None, "Directory of the policy to start from; null starts from `model` (a pipeline fills in its SFT model)."
    )
    reward_model: str | None = option(None, "Directory of the trained reward model (a pipeline fills in its own).")
    iterations: int = option(100, "Rollouts, each followed by its updates.")
    rollout_batch_size: int = option(128, "Prompts per rollout, over all ranks.")
    mini_batch_size: int = option(64, "Sequences per optimizer step, over all ranks.")
    micro_batch_size_per_gpu: int = option(8, "Sequences per forward and backward pass on one rank.")
    ppo_epochs: int = option(1, "Passes over each rollout batch; it is shuffled for each of them.")
    kl_coef: float = option(0.05, "Weight of the per-token KL penalty (k1 estimator) in the reward.")
    kl_target: float | None = option(None, "KL per sequence that an adaptive kl_coef steers to; null keeps it fixed.")
    kl_horizon: int = option(
        10000, "Sequences over which the adaptive kl_coef reacts (Ziegler et al. 2019, section 2.2)."
    )
    kl_budget: float = option(
        30.0, "KL per sequence, in nats, that the run is meant to stay under; beyond it there is a warning."
    )
    clip_range: float = option(0.2, "The probability ratio is clipped to 1 ± clip_range.")
    dual_clip: float | None = option(
        None, "Bound of the loss for negative advantages (Ye et al. 2020: 3); null for none."
    )
    value_clip_range: float = option(0.2, "Values are clipped to the old values ± value_clip_range.")
    gamma: float = option(1.0, "Discount per token.")
    gae_lambda: float = option(0.95, "Lambda of generalised advantage estimation (Schulman et al. 2016).")
    whiten_advantages: bool = option(True, "Give the advantages zero mean and unit variance over all ranks.")
    critic_warmup_iterations: int = option(0, "First iterations in which only the critic is trained.")
    eval_every: int = option(25, "Iterations between evaluations; there is one before and one after in any case.")
    eval_prompts: int = option(128, "Held-out prompts per evaluation at most.")
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
        found += [
            f"{prefix}.{key}={getattr(self, key)}: must be at least 1"
            for key in ("iterations", "ppo_epochs", "rollout_batch_size")
            if getattr(self, key) < 1
        ]
        return found
