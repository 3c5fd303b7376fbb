"""Options of Group-relative policy optimisation (Shao et al. 2024, 2402.03300)."""

from dataclasses import dataclass

from rlhf.config.choices import KlPlacement
from rlhf.config.fields import option
from rlhf.stages.ppo.config import PPOConfig


@dataclass(kw_only=True, slots=True)
class GRPOConfig(PPOConfig):
    """Group-relative policy optimisation (Shao et al. 2024, 2402.03300): without a critic, against the group."""

    name: str = option("grpo", "The stage: a folder of rlhf/stages.")
    rollout_batch_size: int = option(
        512, "Responses per rollout, over all ranks: to rollout_batch_size / group_size prompts.", minimum=1
    )
    group_size: int = option(8, "Responses to each prompt of a rollout.", minimum=1)
    advantage: str = option("grpo", "Advantage estimator; see stage=ppo.")
    critic: bool = option(False, "Whether there is a critic; grpo needs none.")
    kl_placement: KlPlacement = option(KlPlacement.loss, "Where the KL penalty is: in the loss or in the reward.")
    whiten_advantages: bool = option(False, "Give the advantages zero mean and unit variance over all ranks.")
