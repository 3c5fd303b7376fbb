"""Options of best-of-n sampling."""

from dataclasses import dataclass

from rlhf.config.fields import option, option_factory
from rlhf.config.roles import Role
from rlhf.config.schema import StageConfig


@dataclass(kw_only=True, slots=True)
class BestOfNConfig(StageConfig):
    """The best of n answers by the scorer: nothing is trained. What policy optimisation has to beat."""

    name: str = option("best_of_n", "The stage: a folder of rlhf/stages.")
    objective: str = option("eval/score", "The metric of the last evaluation that a sweep compares runs by.")
    actor_model: str | None = option(None, "Directory of the policy, usually an SFT model; null takes `model`.")
    reward_model: str | None = option(None, "Directory of the trained reward model.")
    n: list[int] = option_factory(lambda: [1, 2, 4, 8, 16], "Answers to choose from, each measured; in rising order.")
    eval_prompts: int = option(128, "Held-out prompts at most.", minimum=1)
    micro_batch_size_per_gpu: int = option(8, "Sequences that are scored together on one rank.", minimum=1)

    def roles(self) -> list[Role]:
        """The policy and the reward model, both frozen."""
        return [
            Role(
                name=name,
                optimizer=None,
                batch_size=self.micro_batch_size_per_gpu,
                micro_batch_size_per_gpu=self.micro_batch_size_per_gpu,
                model_key=key,
                directory_key=directory,
                scalar=name == "reward_model",
                generates=name == "actor",
            )
            for name, key, directory in (
                ("actor", "model", "actor_model"),
                ("reward_model", "reward_model", "reward_model"),
            )
        ]

    def problems(self, prefix: str, ranks: int) -> list[str]:
        """Numbers of answers that are no rising list."""
        if not self.n or self.n[0] < 1 or sorted(set(self.n)) != self.n:
            return [f"{prefix}.n={self.n}: give different numbers from 1 on in rising order, as in [1,2,4,8,16]"]
        return []

    def inputs(self) -> tuple[str, ...]:
        """What the answers depend on."""
        return ("model", "reward_model", "memory", "rollout", "scorer")

    def schedule(self) -> list[str]:
        """How much is sampled."""
        return [f"{self.n[-1]} answers to each of up to {self.eval_prompts} held-out prompts; the best of {self.n}"]
