"""What a PPO iteration writes down."""

import math
from typing import cast

from rlhf.stages.ppo.config import PPOConfig
from rlhf.stages.ppo.trainer import DeepSpeedPPOTrainer
from rlhf.stages.session import Session


def record_iteration(session: Session, trainer: DeepSpeedPPOTrainer, *, step: int, sources: dict[str, int]) -> None:
    """Reduce the iteration's metrics over the ranks and log them. Every rank must call."""
    stage = cast(PPOConfig, session.config.stage)
    values = derived_metrics(session.reduced_metrics())
    values["rollout/kl_coef"] = trainer.kl_coef
    values |= session.timing(values.pop("rollout/tokens"))
    values |= {f"data/{name}": float(count) for name, count in sources.items()}
    session.recorder.metrics(step, values)
    shown = {
        "score": values["rollout/score"],
        "KL": values["rollout/kl_per_sequence"],
        "length": values["rollout/response_length"],
    }
    session.recorder.progress(step, shown, tokens_per_second=values["time/tokens_per_second"])
    found = warnings_of(values, stage=stage)
    for name in found.keys() - trainer.shown_warnings:
        session.recorder.line(f"warning: iteration {step}: {found[name]}")
    trainer.shown_warnings = set(found)  # One line when a condition begins, not one for every iteration that it lasts.


def derived_metrics(values: dict[str, float]) -> dict[str, float]:
    """Replace sums of squares by standard deviations and the explained variance of the values.

    explained variance = 1 - Var(returns - values) / Var(returns), over response tokens.
    """
    values = dict(values)
    square = values.pop("rollout/score_square")
    values["rollout/score_std"] = math.sqrt(max(square - values["rollout/score"] ** 2, 0.0))
    error_variance = values.pop("critic/error_square") - values.pop("critic/error") ** 2
    return_variance = values.pop("critic/return_square") - values.pop("critic/return") ** 2
    values["critic/explained_variance"] = 1.0 - error_variance / max(return_variance, 1e-8)
    return values


def warnings_of(values: dict[str, float], *, stage: PPOConfig) -> dict[str, str]:
    """What a user should know about an iteration, by the name of the condition."""
    found = {}
    if values["rollout/kl_per_sequence"] > stage.kl_budget:
        found["kl_over_budget"] = (
            f"KL per sequence {values['rollout/kl_per_sequence']:.1f} is over stage.kl_budget={stage.kl_budget:g}: "
            "raise stage.kl_coef or lower the learning rate"
        )
    first_update = values.get("actor/first_ratio_error", 0.0)
    if first_update > 0.05:
        found["first_ratio"] = (
            f"the first update's probability ratio is off by {first_update:.3f} instead of 0: "
            "sampling and training do not compute the same numbers"
        )
    return found
