"""Advantage estimators by name, and what they see."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from rlhf.functional.advantages import gae, group_normalized, leave_one_out, rewards_to_go
from rlhf.rollout.scorers.function import load_reference


@dataclass(frozen=True, kw_only=True, slots=True)
class Signals:
    """What an estimator may use, of this rank's rollout; R response positions.

    `rewards` hold the score at each response's last token and, unless it is in the loss, the KL penalty of every token.
    `values` are the critic's, None without one. `group_size` consecutive rows answer the same prompt.
    """

    rewards: Float[Tensor, "B R"]
    scores: Float[Tensor, " B"]
    mask: Bool[Tensor, "B R"]
    values: Float[Tensor, "B R"] | None
    group_size: int
    gamma: float
    gae_lambda: float


Estimated = tuple[Float[Tensor, "B R"], Float[Tensor, "B R"]]
Estimator = Callable[[Signals], Estimated]
"""From signals to advantages and to the returns that a critic learns (any tensor [B, R] if there is none)."""


def _gae(signals: Signals) -> Estimated:
    assert signals.values is not None, "the configuration is checked before"
    return gae(signals.rewards, signals.values, signals.mask, gamma=signals.gamma, gae_lambda=signals.gae_lambda)


def _grpo(signals: Signals) -> Estimated:
    advantages = group_normalized(signals.rewards, signals.mask, group_size=signals.group_size)
    return advantages, rewards_to_go(signals.rewards, signals.mask, gamma=signals.gamma)


def _rloo(signals: Signals) -> Estimated:
    advantages = leave_one_out(signals.rewards, signals.mask, group_size=signals.group_size)
    return advantages, rewards_to_go(signals.rewards, signals.mask, gamma=signals.gamma)


def _reinforce_pp(signals: Signals) -> Estimated:
    returns = rewards_to_go(signals.rewards, signals.mask, gamma=signals.gamma)
    return returns, returns


_ESTIMATORS: dict[str, Estimator] = {"gae": _gae, "grpo": _grpo, "rloo": _rloo, "reinforce_pp": _reinforce_pp}


def estimator(name: str, *, key: str) -> Estimator:
    """The estimator of a name, or a user's function; raises ConfigError if there is none. `key` is the option."""
    return _ESTIMATORS[name] if name in _ESTIMATORS else load_reference(name, key=key)
