"""Metrics that are derived from reduced sums."""

import pytest
import torch

from rlhf.stages.ppo.record import derived_metrics


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
