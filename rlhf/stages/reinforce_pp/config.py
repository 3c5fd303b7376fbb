"""Options of REINFORCE++ (Hu et al. 2025, 2501.03262)."""

from dataclasses import dataclass

from rlhf.config.fields import option
from rlhf.stages.ppo.config import PPOConfig


@dataclass(kw_only=True, slots=True)
class ReinforcePPConfig(PPOConfig):
    """REINFORCE++ (Hu et al. 2025, 2501.03262): PPO's clipped loss with whitened rewards-to-go, without a critic."""

    name: str = option("reinforce_pp", "The stage: a folder of rlhf/stages.")
    advantage: str = option("reinforce_pp", "Advantage estimator; see stage=ppo.")
    critic: bool = option(False, "Whether there is a critic; reinforce_pp needs none.")
