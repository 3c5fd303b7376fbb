"""Metrics that are derived from reduced sums, and the warnings that rest on them."""

import pytest
import torch

from rlhf.stages.ppo.config import PPOConfig
from rlhf.stages.ppo.record import derived_metrics, warnings_of


def test_deviation_and_explained_variance_equal_those_of_the_data() -> None:
    torch.manual_seed(0)
    scores, returns = torch.randn(50), torch.randn(200)
    errors = returns - (0.7 * returns + 0.1 * torch.randn(200))
    means = {
        "rollout/score": float(scores.mean()),
        "rollout/score_square": float(scores.square().mean()),
        "critic/error": float(errors.mean()),
        "critic/error_square": float(errors.square().mean()),
        "critic/return": float(returns.mean()),
        "critic/return_square": float(returns.square().mean()),
    }
    derived = derived_metrics(means)
    assert derived["rollout/score_std"] == pytest.approx(float(scores.std(correction=0)), rel=1e-4)
    expected = 1 - float(errors.var(correction=0) / returns.var(correction=0))
    assert derived["critic/explained_variance"] == pytest.approx(expected, rel=1e-4)
    assert set(derived) == {"rollout/score", "rollout/score_std", "critic/explained_variance"}


def test_warnings_name_their_condition() -> None:
    stage = PPOConfig(kl_budget=10.0)
    assert warnings_of({"rollout/kl_per_sequence": 9.0, "actor/first_ratio_error": 0.01}, stage=stage) == {}
    found = warnings_of({"rollout/kl_per_sequence": 11.0, "actor/first_ratio_error": 0.2}, stage=stage)
    assert set(found) == {"kl_over_budget", "first_ratio"}
    assert "stage.kl_budget=10" in found["kl_over_budget"]
