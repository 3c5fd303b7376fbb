"""Health rules: what a run's metrics say of its health, each rule with a name, a threshold and a remedy.

A rule sees the metrics of the present iteration, those of the run's first iterations, and the evaluations. It finds
nothing or says what it saw. Names are those of the fields of `HealthConfig`.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from statistics import fmean

from rlhf.config.policy import HealthConfig, RuleAction, RuleConfig

Values = Mapping[str, float]
FIRST = 5  # Iterations that a run is compared with.
RECENT = 5  # Iterations over which noisy metrics are averaged.


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What a rule found, in words, and what to do: `action` is warn or stop."""

    rule: str
    action: RuleAction
    message: str


@dataclass(kw_only=True, slots=True)
class History:
    """What the rules compare with. It is fed the same reduced metrics on every rank, so that all ranks agree."""

    kl_budget: float
    first: dict[str, list[float]] = field(default_factory=dict)
    recent: deque[Values] = field(default_factory=lambda: deque(maxlen=RECENT))
    iterations: int = 0
    evaluations: list[Values] = field(default_factory=list)

    def add(self, values: Values) -> None:
        """Take in an iteration's metrics."""
        self.iterations += 1
        for name, value in values.items():
            if len(known := self.first.setdefault(name, [])) < FIRST:
                known.append(value)
        self.recent.append(values)

    def at_first(self, name: str) -> float:
        """The mean of a metric over the first iterations that have it; NaN if there is none."""
        return fmean(self.first[name]) if name in self.first else math.nan

    def lately(self, name: str) -> float:
        """The mean of a metric over the last iterations; NaN before there are enough of them."""
        values = [row[name] for row in self.recent if name in row]
        return fmean(values) if len(values) == RECENT else math.nan


def _first_ratio(values: Values, history: History, threshold: float) -> str | None:
    error = values.get("actor/first_ratio_error", 0.0)
    if error > threshold:
        return (
            f"the first update's probability ratio is off by {error:.3g} instead of 0: sampling and training do not "
            "compute the same numbers; set rollout=hf, attention=eager or memory.precision=fp32 to find out which"
        )
    return None


def _kl_over_budget(values: Values, history: History, threshold: float) -> str | None:
    kl, budget = values.get("rollout/kl_per_sequence", 0.0), threshold * history.kl_budget
    if kl > budget:
        return (
            f"KL per sequence {kl:.1f} is over the budget of {budget:g} (stage.kl_budget={history.kl_budget:g}): "
            "raise stage.kl_coef, lower the learning rate, or stop earlier"
        )
    return None


def _entropy_collapse(values: Values, history: History, threshold: float) -> str | None:
    now, before = history.lately("actor/entropy"), history.at_first("actor/entropy")
    if now < threshold * before:
        return (
            f"entropy per token {now:.3f} is below {threshold:g} of the {before:.3f} at the start: answers become "
            "alike; raise stage.kl_coef or lower the learning rate"
        )
    return None


def _length_collapse(values: Values, history: History, threshold: float) -> str | None:
    now, before = history.lately("rollout/response_length"), history.at_first("rollout/response_length")
    if now < threshold * before:
        return (
            f"answers have {now:.1f} tokens, below {threshold:g} of the {before:.1f} at the start: does the scorer "
            "like short ones? Raise stage.kl_coef, or look at samples.jsonl"
        )
    return None


def _length_runaway(values: Values, history: History, threshold: float) -> str | None:
    now, before = history.lately("rollout/response_length"), history.at_first("rollout/response_length")
    if now > threshold * before:
        return (
            f"answers have {now:.1f} tokens, more than {threshold:g} times the {before:.1f} at the start: raise "
            "stage.kl_coef, or set scorer.length_penalty and scorer.length_limit"
        )
    return None


def _missing_eos(values: Values, history: History, threshold: float) -> str | None:
    missing = 1.0 - history.lately("rollout/eos_rate")
    if missing > threshold:
        return (
            f"{100 * missing:.0f} % of the answers were cut off before EOS (threshold {100 * threshold:g} %): raise "
            "rollout.max_new_tokens or scorer.missing_eos_penalty"
        )
    return None


def _explained_variance(values: Values, history: History, threshold: float) -> str | None:
    now = history.lately("critic/explained_variance")
    # A critic that starts from a reward model has to learn first what a score at the end is worth at the beginning.
    if now < threshold and history.iterations >= FIRST + RECENT:
        return (
            f"the critic explains {now:.2f} of the returns' variance, less than {threshold:g}: it is worse than a "
            "constant; raise stage.critic_optimizer.learning_rate or stage.critic_warmup_iterations"
        )
    return None


def _clip_fraction(values: Values, history: History, threshold: float) -> str | None:
    share = values.get("actor/clip_fraction", 0.0)
    if share > threshold:
        return (
            f"{100 * share:.0f} % of the tokens are clipped (threshold {100 * threshold:g} %): the steps are too "
            "large; lower stage.optimizer.learning_rate or stage.ppo_epochs"
        )
    return None


def _over_optimisation(values: Values, history: History, threshold: float) -> str | None:
    rows = [row for row in history.evaluations if "eval/judge_positive" in row]
    if len(rows) < 2:
        return None
    last, best = rows[-1], max(rows[:-1], key=lambda row: row["eval/judge_positive"])
    fall = best["eval/judge_positive"] - last["eval/judge_positive"]
    if fall > threshold and last["eval/score"] > best["eval/score"]:
        return (
            f"the score rose from {best['eval/score']:.2f} to {last['eval/score']:.2f} while the judge's positive "
            f"share fell by {100 * fall:.0f} points: the policy exploits the scorer; raise stage.kl_coef"
        )
    return None


def _non_finite(values: Values, history: History, threshold: float) -> str | None:
    # DeepSpeed gives no finite norm for a step that it skips, which is counted below.
    ignored = ("time/", "actor/grad_norm", "critic/grad_norm")
    bad = [name for name, value in values.items() if not math.isfinite(value) and not name.startswith(ignored)]
    skipped = {name: values.get(f"{name}/skipped_steps", 0.0) for name in ("actor", "critic")}
    worst = max(skipped, key=lambda name: skipped[name])
    if bad:
        return f"{', '.join(sorted(bad))} is not finite: lower the learning rates, or set memory.precision=fp32"
    if skipped[worst] > threshold:
        return (
            f"{100 * skipped[worst]:.0f} % of the {worst}'s steps were skipped because their gradients were not "
            "finite: lower its learning rate, or set memory.precision=bf16 or fp32"
        )
    return None


def _loss_scale(values: Values, history: History, threshold: float) -> str | None:
    for name in ("actor", "critic"):
        scale = values.get(f"{name}/loss_scale", math.inf)
        if scale <= threshold:
            return (
                f"the {name}'s fp16 loss scale is {scale:g}, its floor: its gradients overflow whatever the scale; "
                "lower its learning rate, or set memory.precision=fp32"
            )
    return None


def _equal_scores(values: Values, history: History, threshold: float) -> str | None:
    spread = values.get("rollout/score_std", math.inf)
    if spread <= threshold:
        return (
            f"all scores of the rollout are equal (standard deviation {spread:.2g}): there is nothing to learn from "
            "them; look at the scorer, or at scorer.clip"
        )
    return None


# A rule is a function here and a field of HealthConfig, of the same name.
RULES: dict[str, Callable[[Values, History, float], str | None]] = {
    "first_ratio": _first_ratio,
    "kl_over_budget": _kl_over_budget,
    "entropy_collapse": _entropy_collapse,
    "length_collapse": _length_collapse,
    "length_runaway": _length_runaway,
    "missing_eos": _missing_eos,
    "explained_variance": _explained_variance,
    "clip_fraction": _clip_fraction,
    "over_optimisation": _over_optimisation,
    "non_finite": _non_finite,
    "loss_scale": _loss_scale,
    "equal_scores": _equal_scores,
}


OF_EVALUATIONS = ("over_optimisation",)


def examine(values: Values, history: History, config: HealthConfig, *, of_evaluations: bool = False) -> list[Finding]:
    """What the rules that are not off say of an iteration's reduced metrics, which `history` already holds.

    `of_evaluations` asks the rules that look at evaluations instead of the others.
    """
    found = []
    for entry in fields(config):
        rule: RuleConfig = getattr(config, entry.name)
        if rule.action is RuleAction.off or (entry.name in OF_EVALUATIONS) != of_evaluations:
            continue
        message = RULES[entry.name](values, history, rule.threshold)
        if message is not None:
            found.append(Finding(rule=entry.name, action=rule.action, message=message))
    return found
