"""Options of supervised fine-tuning."""

from dataclasses import dataclass

from rlhf.config.fields import option, option_factory
from rlhf.config.roles import Role, divisibility_problems
from rlhf.config.schema import OptimizerConfig, StageConfig


@dataclass(kw_only=True, slots=True)
class SFTConfig(StageConfig):
    """Next-token training on the response tokens of the demonstrations."""

    name: str = option("sft", "The stage: a folder of rlhf/stages.")
    objective: str = option("eval/loss", "The metric of the last evaluation that a sweep compares runs by.")
    batch_size: int = option(64, "Sequences per optimizer step, over all ranks.")
    micro_batch_size_per_gpu: int = option(
        0, "Sequences per forward and backward pass on one rank; 0: as many as divide the batch, up to 8.", minimum=0
    )
    packing: bool = option(
        False, "Put the examples of a micro-batch one behind the other instead of padding them; none sees another."
    )
    dropout: float | None = option(
        None,
        "Probability of every dropout of the model in training; null: what the model's configuration says.",
        minimum=0,
        maximum=0.99,
    )
    epochs: float = option(1.0, "Passes over the training part.", above=0)
    max_steps: int | None = option(None, "Optimizer steps at most; null for no bound beside `epochs`.", minimum=1)
    eval_every: int = option(
        100, "Optimizer steps between evaluations; there is one before and one after in any case.", minimum=1
    )
    eval_examples: int = option(512, "Held-out examples per evaluation at most.", minimum=1)
    optimizer: OptimizerConfig = option_factory(OptimizerConfig, "Optimizer of the model.")

    def roles(self) -> list[Role]:
        """One trained model."""
        return [
            Role(
                name="model",
                optimizer=self.optimizer,
                batch_size=self.batch_size,
                micro_batch_size_per_gpu=self.micro_batch_size_per_gpu,
                generates=True,
            )
        ]

    def problems(self, prefix: str, ranks: int) -> list[str]:
        """Batch sizes that do not divide."""
        return divisibility_problems(f"{prefix}.batch_size", self.batch_size, self.micro_batch_size_per_gpu, ranks)

    def inputs(self) -> tuple[str, ...]:
        """What its training reads; sampling and scoring come later."""
        return ("model", "memory", "lora")

    def schedule(self) -> list[str]:
        """The optimizer steps, which the number of rows decides unless `max_steps` does."""
        bound = f", at most {self.max_steps}" if self.max_steps is not None else ""
        return [
            f"{self.epochs:g} epochs: {self.epochs:g} × rows / {self.batch_size} optimizer steps{bound}; the schedule "
            f"is {self.optimizer.schedule.name} over all of them"
        ]
