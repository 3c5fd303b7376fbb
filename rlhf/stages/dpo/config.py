"""Options of direct preference optimisation."""

from dataclasses import dataclass

from rlhf.config.choices import DpoLoss
from rlhf.config.fields import option, option_factory
from rlhf.config.roles import Role, divisibility_problems
from rlhf.config.schema import OptimizerConfig, StageConfig


@dataclass(kw_only=True, slots=True)
class DPOConfig(StageConfig):
    """The policy is trained on preference pairs directly, without reward model and rollouts (Rafailov et al. 2023)."""

    name: str = option("dpo", "The stage: a folder of rlhf/stages.")
    objective: str = option("eval/accuracy", "The metric of the last evaluation that a sweep compares runs by.")
    actor_model: str | None = option(
        None, "Directory of the policy to start from, usually an SFT model; null starts from `model`."
    )
    loss: DpoLoss = option(
        DpoLoss.sigmoid,
        "sigmoid: -log sigmoid(beta h), h = difference of the answers' log-ratios. ipo: (h - 1 / (2 beta))^2, with "
        "log-ratios averaged over an answer's tokens (Azar et al. 2023).",
    )
    beta: float = option(0.1, "Strength of the tie to the reference.", above=0)
    label_smoothing: float = option(
        0.0, "loss=sigmoid: share of pairs whose preference is taken to be wrong (cDPO).", minimum=0, maximum=0.49
    )
    batch_size: int = option(32, "Pairs per optimizer step, over all ranks.")
    micro_batch_size_per_gpu: int = option(
        0, "Pairs per forward and backward pass on one rank; 0: as many as divide the batch, up to 8.", minimum=0
    )
    epochs: float = option(1.0, "Passes over the training part.", above=0)
    max_steps: int | None = option(None, "Optimizer steps at most; null for no bound beside `epochs`.", minimum=1)
    eval_every: int = option(
        100, "Optimizer steps between evaluations; there is one before and one after in any case.", minimum=1
    )
    eval_examples: int = option(512, "Held-out pairs per evaluation at most.", minimum=1)
    optimizer: OptimizerConfig = option_factory(lambda: OptimizerConfig(learning_rate=5e-7), "Optimizer of the policy.")

    def roles(self) -> list[Role]:
        """The policy and its frozen start; a pair is two sequences in one forward pass."""
        return [
            Role(
                name=name,
                optimizer=optimizer,
                batch_size=self.batch_size,
                micro_batch_size_per_gpu=self.micro_batch_size_per_gpu,
                directory_key="actor_model",
                generates=name == "actor",
            )
            for name, optimizer in {"actor": self.optimizer, "reference": None}.items()
        ]

    def problems(self, prefix: str, ranks: int) -> list[str]:
        """Batch sizes that do not divide, and an option that its loss does not have."""
        found = divisibility_problems(f"{prefix}.batch_size", self.batch_size, self.micro_batch_size_per_gpu, ranks)
        if self.label_smoothing and self.loss is DpoLoss.ipo:
            found.append(
                f"{prefix}.label_smoothing={self.label_smoothing}: loss=ipo has no label smoothing; set it to 0"
            )
        return found

    def inputs(self) -> tuple[str, ...]:
        """What its training reads."""
        return ("model", "memory", "lora")

    def schedule(self) -> list[str]:
        """The optimizer steps, which the number of rows decides unless `max_steps` does."""
        bound = f", at most {self.max_steps}" if self.max_steps is not None else ""
        return [
            f"{self.epochs:g} epochs: {self.epochs:g} × rows / {self.batch_size} optimizer steps{bound}; the schedule "
            f"is {self.optimizer.schedule.name} over all of them"
        ]
