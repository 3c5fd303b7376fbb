"""Options of REINFORCE leave-one-out (Ahmadian et al. 2024, 2402.14740)."""

from dataclasses import dataclass

from rlhf.config.fields import option
from rlhf.stages.ppo.config import PPOConfig


@dataclass(kw_only=True, slots=True)
class RLOOConfig(PPOConfig):
    """REINFORCE leave-one-out (Ahmadian et al. 2024, 2402.14740): each answer against its group's others."""

    name: str = option("rloo", "The stage: a folder of rlhf/stages.")
    rollout_batch_size: int = option(
        256, "Responses per rollout, over all ranks: to rollout_batch_size / group_size prompts.", minimum=1
    )
    group_size: int = option(4, "Responses to each prompt of a rollout.", minimum=1)
    advantage: str = option("rloo", "Advantage estimator; see stage=ppo.")
    critic: bool = option(False, "Whether there is a critic; rloo needs none.")
    whiten_advantages: bool = option(False, "Give the advantages zero mean and unit variance over all ranks.")
