"""PPO's loop with other options: the estimator decides what the advantages are."""

from rlhf.stages.ppo.train import run as run
