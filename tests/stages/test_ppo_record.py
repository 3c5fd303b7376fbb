"""Metrics that are derived from reduced sums."""

import math
from pathlib import Path

import pytest
import torch

from rlhf.config.files import write_config
from rlhf.config.schema import Config
from rlhf.stages.pipeline.config import PipelineConfig
from rlhf.stages.ppo.config import PPOConfig
from rlhf.stages.ppo.record import derived_metrics
from rlhf.stages.session import option_prefix
from rlhf.tracking.metrics import MetricAccumulator


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


@pytest.mark.parametrize("score", [0.1, -1.6, 0.0, 12345.678])
def test_equal_scores_have_no_spread(score: float) -> None:
    metrics = MetricAccumulator()
    for rows in (3, 64, 61):
        scores = torch.full((rows,), score).double()
        metrics.add("rollout/score", scores.sum(), rows)
        metrics.add("rollout/score_square", scores.square().sum(), rows)
    assert derived_metrics(metrics.flush())["rollout/score_std"] == 0.0
    broken = derived_metrics({"rollout/score": math.nan, "rollout/score_square": math.nan})
    assert math.isnan(broken["rollout/score_std"])


def test_options_are_named_as_the_command_line_has_them(tmp_path: Path) -> None:
    """The health rules' remedies name options; in a pipeline these have the stage's name in front."""

    stage = tmp_path / "ppo"
    assert option_prefix(stage, "ppo") == "stage"
    write_config(Config(stage=PipelineConfig()), tmp_path / "config.yaml")
    assert option_prefix(stage, "ppo") == "stage.ppo"
    assert option_prefix(tmp_path / "other", "ppo") == "stage"
    write_config(Config(stage=PPOConfig()), tmp_path / "config.yaml")
    assert option_prefix(stage, "ppo") == "stage"
