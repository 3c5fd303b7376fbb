"""Generalised advantage estimation against its explicit sum."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loops import gae_loop, poisoned, random_like, right_padded_masks
from torch import Tensor

from rlhf.functional.advantages import gae

rates = st.floats(0.0, 1.0)


@given(mask=right_padded_masks(allow_empty=True), seed=st.integers(0, 999), gamma=rates, gae_lambda=rates)
def test_against_the_explicit_sum(mask: Tensor, seed: int, gamma: float, gae_lambda: float) -> None:
    rewards, values = random_like(mask, seed=seed), random_like(mask, seed=seed + 1)
    advantages, returns = gae(poisoned(rewards, mask), poisoned(values, mask), mask, gamma=gamma, gae_lambda=gae_lambda)
    for b, length in enumerate(mask.sum(dim=1).tolist()):
        its_values = values[b, :length].tolist()
        expected = gae_loop(rewards[b, :length].tolist(), its_values, gamma=gamma, gae_lambda=gae_lambda)
        assert advantages[b, :length].tolist() == pytest.approx(expected, abs=1e-10)
        assert returns[b, :length].tolist() == pytest.approx(
            [a + v for a, v in zip(expected, its_values, strict=True)], abs=1e-10
        )
    assert torch.all(advantages[~mask] == 0)
    assert torch.all(returns[~mask] == 0)


@given(mask=right_padded_masks(), seed=st.integers(0, 999))
def test_with_lambda_one_the_returns_are_the_rewards_to_go(mask: Tensor, seed: int) -> None:
    rewards, values = random_like(mask, seed=seed) * mask, random_like(mask, seed=seed + 1)
    _, returns = gae(rewards, values, mask, gamma=1.0, gae_lambda=1.0)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(returns, torch.where(mask, to_go, 0.0))


def test_nothing_is_bootstrapped_after_the_last_token() -> None:
    mask = torch.tensor([[True, True, False]])
    values = torch.tensor([[1.0, 2.0, 1000.0]])
    advantages, returns = gae(torch.tensor([[0.0, 5.0, 0.0]]), values, mask, gamma=1.0, gae_lambda=0.0)
    assert advantages.tolist() == [[1.0, 3.0, 0.0]]
    assert returns.tolist() == [[2.0, 5.0, 0.0]]
