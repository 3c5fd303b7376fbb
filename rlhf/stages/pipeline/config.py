"""Options of the whole pipeline: those of its three stages."""

from dataclasses import dataclass

from rlhf.config.fields import option, option_factory
from rlhf.config.schema import StageConfig
from rlhf.stages.ppo.config import PPOConfig
from rlhf.stages.rm.config import RMConfig
from rlhf.stages.sft.config import SFTConfig


@dataclass(kw_only=True, slots=True)
class PipelineConfig(StageConfig):
    """SFT, reward model and PPO in this order, each its own launch, each taking the former's output."""

    name: str = option("pipeline", "The stage: a folder of rlhf/stages.")
    objective: str = option("eval/score", "The metric of the last evaluation that a sweep compares runs by.")
    sft: SFTConfig = option_factory(SFTConfig, "Supervised fine-tuning.")
    rm: RMConfig = option_factory(RMConfig, "Reward-model training.")
    ppo: PPOConfig = option_factory(PPOConfig, "Policy optimisation.")

    def problems(self, prefix: str, ranks: int) -> list[str]:
        """The problems of all three stages."""
        return [
            problem
            for name, stage in (("sft", self.sft), ("rm", self.rm), ("ppo", self.ppo))
            for problem in stage.problems(f"{prefix}.{name}", ranks)
        ]
