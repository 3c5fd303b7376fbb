"""Options of reward-model training."""

from dataclasses import dataclass

from rlhf.config.fields import option, option_factory
from rlhf.config.roles import Role, divisibility_problems
from rlhf.config.schema import OptimizerConfig, StageConfig


@dataclass(kw_only=True, slots=True)
class RMConfig(StageConfig):
    """Pairwise ranking loss on a scalar head (Bradley-Terry; InstructGPT, equation 1)."""

    name: str = option("rm", "The stage: a folder of rlhf/stages.")
    objective: str = option("eval/accuracy", "The metric of the last evaluation that a sweep compares runs by.")
    sft_model: str | None = option(
        None,
        "Directory of the model to start from; null starts from `reward_model` (a pipeline fills in its SFT model).",
    )
    batch_size: int = option(64, "Pairs per optimizer step, over all ranks.")
    micro_batch_size_per_gpu: int = option(
        0, "Pairs per forward and backward pass on one rank; 0: as many as divide the batch, up to 8.", minimum=0
    )
    epochs: float = option(1.0, "Passes over the training part.", above=0)
    max_steps: int | None = option(None, "Optimizer steps at most; null for no bound beside `epochs`.", minimum=1)
    eval_every: int = option(
        100, "Optimizer steps between evaluations; there is one before and one after in any case.", minimum=1
    )
    eval_examples: int = option(1024, "Held-out pairs per evaluation at most.", minimum=1)
    centering_coef: float = option(
        0.01, "Weight of (chosen + rejected)^2, which keeps the mean score near zero.", minimum=0
    )
    dropout: float | None = option(
        None,
        "Probability of every dropout of the model in training; null: what the model's configuration says.",
        minimum=0,
        maximum=0.99,
    )
    optimizer: OptimizerConfig = option_factory(OptimizerConfig, "Optimizer of the model.")

    def roles(self) -> list[Role]:
        """One trained model; a pair is two sequences in one forward pass."""
        return [
            Role(
                name="model",
                optimizer=self.optimizer,
                batch_size=self.batch_size,
                micro_batch_size_per_gpu=self.micro_batch_size_per_gpu,
                model_key="reward_model",
                directory_key="sft_model",
                scalar=True,
            )
        ]

    def problems(self, prefix: str, ranks: int) -> list[str]:
        """Batch sizes that do not divide."""
        return divisibility_problems(f"{prefix}.batch_size", self.batch_size, self.micro_batch_size_per_gpu, ranks)

    def inputs(self) -> tuple[str, ...]:
        """What its training reads; sampling and scoring come later."""
        return ("reward_model", "memory", "lora")

    def schedule(self) -> list[str]:
        """The optimizer steps, which the number of rows decides unless `max_steps` does."""
        bound = f", at most {self.max_steps}" if self.max_steps is not None else ""
        return [
            f"{self.epochs:g} epochs: {self.epochs:g} × rows / {self.batch_size} optimizer steps{bound}; the schedule "
            f"is {self.optimizer.schedule.name} over all of them"
        ]
