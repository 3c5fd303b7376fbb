"""What a PPO iteration writes down, and what the health rules make of it."""

import math
from dataclasses import replace
from typing import cast

from rlhf.config.choices import RuleAction
from rlhf.stages.ppo.config import PPOConfig
from rlhf.stages.ppo.trainer import DeepSpeedPPOTrainer
from rlhf.stages.session import Session, option_prefix
from rlhf.tracking.health import Finding, History, examine


class IterationRecord:
    """Logs iterations and evaluations, and asks the health rules about them. The same on every rank."""

    def __init__(self, session: Session, trainer: DeepSpeedPPOTrainer) -> None:
        self._session, self._trainer = session, trainer
        self._stage = cast(PPOConfig, session.config.stage)
        self._history = History(kl_budget=self._stage.kl_budget)
        self._said: dict[bool, set[str]] = {False: set(), True: set()}
        self._prefix = option_prefix(session.run_dir, self._stage.name)

    def evaluation(self, values: dict[str, float], *, step: int) -> Finding | None:
        """Take in an evaluation; returns a finding that is to stop the run, on every rank."""
        self._history.evaluations.append(values)
        return self._examined(values, step=step, of_evaluations=True)

    def iteration(self, *, step: int, sources: dict[str, int]) -> Finding | None:
        """Reduce the iteration's metrics over the ranks, log them, and say what is unhealthy. Every rank must call.

        Returns the first finding that is to stop the run, on every rank.
        """
        session = self._session
        values = derived_metrics(session.reduced_metrics())
        values["rollout/kl_coef"] = self._trainer.kl_coef
        values |= session.timing(values.pop("rollout/tokens"))
        values |= {f"data/{name}": float(count) for name, count in sources.items()}
        session.recorder.metrics(step, values)
        shown = {
            "score": values["rollout/score"],
            "KL": values["rollout/kl_per_sequence"],
            "length": values["rollout/response_length"],
        }
        session.recorder.progress(step, shown, tokens_per_second=values["time/tokens_per_second"])
        self._history.add(values)
        return self._examined(values, step=step, of_evaluations=False)

    def _examined(self, values: dict[str, float], *, step: int, of_evaluations: bool) -> Finding | None:
        found = [
            replace(finding, message=finding.message.replace("stage.", f"{self._prefix}."))
            for finding in examine(values, self._history, self._stage.health, of_evaluations=of_evaluations)
        ]
        for finding in found:
            # One line when a condition begins, not one for every iteration that it lasts.
            if finding.rule not in self._said[of_evaluations]:
                line = f"{finding.action.name}: iteration {step}: {finding.rule}: {finding.message}"
                self._session.recorder.line(line)
        self._said[of_evaluations] = {finding.rule for finding in found}
        return next((finding for finding in found if finding.action is RuleAction.stop), None)


def derived_metrics(values: dict[str, float]) -> dict[str, float]:
    """Replace sums of squares by standard deviations and the explained variance of the values.

    explained variance = 1 - Var(returns - values) / Var(returns), over response tokens.
    """
    values = dict(values)
    square = values.pop("rollout/score_square")
    for name in ("actor", "critic"):
        if (inverse := values.pop(f"{name}/inverse_loss_scale", None)) is not None:
            values[f"{name}/loss_scale"] = 1.0 / inverse
    variance = square - values["rollout/score"] ** 2
    # What is left of equal scores is rounding.
    values["rollout/score_std"] = 0.0 if variance <= 1e-12 * square else math.sqrt(variance)
    if "critic/error" not in values:
        return values
    error_variance = values.pop("critic/error_square") - values.pop("critic/error") ** 2
    return_variance = values.pop("critic/return_square") - values.pop("critic/return") ** 2
    values["critic/explained_variance"] = 1.0 - error_variance / max(return_variance, 1e-8)
    return values
