"""The weight of the pretraining text relative to the policy's gradient."""

import math

import pytest

from rlhf.rollout.mixing import GradientRatio


def test_the_weight_gives_the_text_its_share_of_the_norm() -> None:
    ratio = GradientRatio(0.5)
    assert ratio.weight == 0.5
    ratio.update(2.0, 8.0)
    assert ratio.weight * 8.0 == pytest.approx(0.5 * 2.0)
    for _ in range(200):
        ratio.update(3.0, 1.0)
    assert ratio.weight == pytest.approx(1.5, rel=1e-3)


def test_steps_that_are_not_finite_and_gradients_of_zero_are_passed() -> None:
    ratio = GradientRatio(0.5)
    ratio.update(math.nan, 1.0)
    ratio.update(1.0, math.inf)
    assert ratio.weight == 0.5
    ratio.update(1.0, 0.0)
    ratio.update(0.0, 3.0)
    assert ratio.weight == 0.5
