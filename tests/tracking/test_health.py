"""Every health rule is provoked, and silent where nothing is wrong."""

import math
from dataclasses import fields

import pytest

from rlhf.config.policy import HealthConfig, RuleAction, RuleConfig
from rlhf.tracking.health import RULES, History, examine

WELL = {
    "rollout/kl_per_sequence": 4.0,
    "rollout/response_length": 40.0,
    "rollout/eos_rate": 0.95,
    "rollout/score_std": 0.8,
    "actor/first_ratio_error": 0.0,
    "actor/entropy": 2.0,
    "actor/clip_fraction": 0.1,
    "actor/skipped_steps": 0.0,
    "actor/loss_scale": 65536.0,
    "critic/explained_variance": 0.6,
    "critic/skipped_steps": 0.0,
}


def said(
    *iterations: dict[str, float], evaluations: tuple[dict[str, float], ...] = (), **rules: RuleConfig
) -> set[str]:
    """The rules that speak at the last of these iterations, which come after five healthy ones."""
    history = History(kl_budget=10.0, evaluations=list(evaluations))
    found = []
    for values in [WELL] * 5 + list(iterations):
        history.add(values)
        found = examine(values, history, HealthConfig(**rules))
    found += examine({}, history, HealthConfig(**rules), of_evaluations=True)
    return {finding.rule for finding in found}


def test_rules_and_options_have_the_same_names() -> None:
    assert [entry.name for entry in fields(HealthConfig)] == list(RULES)


def test_nothing_is_said_of_a_healthy_run() -> None:
    good = ({"eval/score": 0.0, "eval/judge_positive": 0.5}, {"eval/score": 1.0, "eval/judge_positive": 0.8})
    assert said(*[WELL] * 20, evaluations=good) == set()


@pytest.mark.parametrize(
    ("rule", "change", "iterations"),
    [
        ("first_ratio", {"actor/first_ratio_error": 0.06}, 1),
        ("kl_over_budget", {"rollout/kl_per_sequence": 10.5}, 1),
        ("entropy_collapse", {"actor/entropy": 0.3}, 5),
        ("length_collapse", {"rollout/response_length": 15.0}, 5),
        ("length_runaway", {"rollout/response_length": 110.0}, 5),
        ("missing_eos", {"rollout/eos_rate": 0.4}, 5),
        ("explained_variance", {"critic/explained_variance": -0.1}, 5),
        ("clip_fraction", {"actor/clip_fraction": 0.5}, 1),
        ("non_finite", {"actor/loss": math.nan}, 1),
        ("non_finite", {"critic/skipped_steps": 0.5}, 1),
        ("loss_scale", {"actor/loss_scale": 1.0}, 1),
        ("equal_scores", {"rollout/score_std": 0.0}, 1),
    ],
)
def test_a_rule_speaks_when_provoked(rule: str, change: dict[str, float], iterations: int) -> None:
    assert said(*[WELL | change] * iterations) == {rule}
    off = RuleConfig(action=RuleAction.off)
    assert said(*[WELL | change] * iterations, **{rule: off}) == set()


def test_noisy_metrics_are_averaged_before_a_rule_speaks() -> None:
    assert said(WELL | {"actor/entropy": 0.1}) == set()


def test_a_score_that_rises_while_the_judge_turns_away_is_over_optimisation() -> None:
    first, best = {"eval/score": 0.0, "eval/judge_positive": 0.5}, {"eval/score": 1.0, "eval/judge_positive": 0.9}
    worse, both = {"eval/score": 2.0, "eval/judge_positive": 0.8}, {"eval/score": 0.5, "eval/judge_positive": 0.8}
    assert said(WELL, evaluations=(first, best, worse)) == {"over_optimisation"}
    assert said(WELL, evaluations=(first, best, both)) == set()  # The score fell, too: nothing is exploited.
    assert said(WELL, evaluations=(first, {"eval/score": 1.0})) == set()  # There is no judge.


def test_findings_say_what_was_seen_and_what_to_do() -> None:
    history = History(kl_budget=10.0)
    values = WELL | {"rollout/kl_per_sequence": 21.0}
    history.add(values)
    strict = HealthConfig(kl_over_budget=RuleConfig(action=RuleAction.stop, threshold=2.0))
    (finding,) = examine(values, history, strict)
    assert finding.action is RuleAction.stop
    assert "21.0 is over the budget of 20" in finding.message and "raise stage.kl_coef" in finding.message


def test_a_run_without_a_critic_has_no_critic_to_blame() -> None:
    assert said(*[{name: value for name, value in WELL.items() if not name.startswith("critic/")}] * 6) == set()


def test_what_begins_late_is_compared_with_its_own_beginning() -> None:
    warmup = [{name: value for name, value in WELL.items() if not name.startswith("actor/")}] * 9
    history = History(kl_budget=10.0)
    for values in [*warmup, *[WELL] * 5, *[WELL | {"actor/entropy": 0.1}] * 5]:
        history.add(values)
    assert {finding.rule for finding in examine(WELL, history, HealthConfig())} == {"entropy_collapse"}


def test_an_overflow_that_is_skipped_is_counted_not_called_infinite() -> None:
    overflow = WELL | {"actor/grad_norm": math.nan, "actor/skipped_steps": 0.5}
    assert said(overflow, non_finite=RuleConfig(threshold=0.9)) == set()
    assert said(overflow, non_finite=RuleConfig(threshold=0.4)) == {"non_finite"}


def test_a_critic_has_time_to_begin() -> None:
    history, found = History(kl_budget=10.0), []
    for _ in range(10):
        values = WELL | {"critic/explained_variance": -0.3}
        history.add(values)
        found.append([finding.rule for finding in examine(values, history, HealthConfig())])
    assert found == [[]] * 9 + [["explained_variance"]]
