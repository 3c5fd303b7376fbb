"""Advantage estimators against their explicit sums."""

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loops import gae_loop, poisoned, random_like, right_padded_masks
from torch import Tensor

from rlhf.functional.advantages import gae, group_normalized, importance_weights, leave_one_out, rewards_to_go

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


@st.composite
def groups(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Rewards and masks of whole groups of answers, each answer with its own length."""
    size, count, width = draw(st.integers(2, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    lengths = draw(st.lists(st.integers(0, width), min_size=size * count, max_size=size * count))
    mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    return random_like(mask, seed=draw(st.integers(0, 999))), mask, size


def totals_of(rewards: Tensor, mask: Tensor, size: int) -> list[list[float]]:
    sums = [sum(row[: int(kept.sum())].tolist()) for row, kept in zip(rewards, mask, strict=True)]
    return [sums[start : start + size] for start in range(0, len(sums), size)]


@given(groups())
def test_an_answer_is_compared_with_its_group(given_groups: tuple[Tensor, Tensor, int]) -> None:
    rewards, mask, size = given_groups
    normalized = group_normalized(poisoned(rewards, mask), mask, group_size=size)
    left_out = leave_one_out(poisoned(rewards, mask), mask, group_size=size)
    for number, sums in enumerate(totals_of(rewards, mask, size)):
        for place, own in enumerate(sums):
            row = number * size + place
            others = [value for index, value in enumerate(sums) if index != place]
            expected = (own - statistics.fmean(sums)) / (statistics.stdev(sums) + 1e-6)
            kept = int(mask[row].sum())
            assert normalized[row, :kept].tolist() == pytest.approx([expected] * kept, abs=1e-6)
            assert left_out[row, :kept].tolist() == pytest.approx([own - statistics.fmean(others)] * kept, abs=1e-9)
    assert torch.all(normalized[~mask] == 0) and torch.all(left_out[~mask] == 0)


@pytest.mark.parametrize("size", [2, 3, 5, 6, 7, 12])
def test_equal_answers_teach_nothing(size: int) -> None:
    rewards, mask = torch.full((size, 1), -3.96), torch.ones(size, 1, dtype=torch.bool)
    assert torch.all(group_normalized(rewards, mask, group_size=size) == 0)
    assert leave_one_out(rewards, mask, group_size=size).abs().max() < 1e-6


@pytest.mark.parametrize("size", [1, 3])
def test_broken_groups_are_refused(size: int) -> None:
    rewards, mask = torch.zeros(4, 1), torch.ones(4, 1, dtype=torch.bool)
    for estimate in (group_normalized, leave_one_out):
        with pytest.raises(ValueError, match=f"group_size={size}: 4 responses are not whole groups"):
            estimate(rewards, mask, group_size=size)


@given(mask=right_padded_masks(allow_empty=True), seed=st.integers(0, 999), gamma=rates)
def test_rewards_to_go_against_the_explicit_sum(mask: Tensor, seed: int, gamma: float) -> None:
    rewards = random_like(mask, seed=seed)
    returns = rewards_to_go(poisoned(rewards, mask), mask, gamma=gamma)
    for row, length in enumerate(mask.sum(dim=1).tolist()):
        values = rewards[row, :length].tolist()
        expected = [sum(gamma ** (k - t) * values[k] for k in range(t, length)) for t in range(length)]
        assert returns[row, :length].tolist() == pytest.approx(expected, abs=1e-9)
    assert torch.all(returns[~mask] == 0)


def test_importance_weights_are_ratios_up_to_a_cap() -> None:
    trained = torch.log(torch.tensor([[0.2, 0.6, 0.5], [0.1, 0.3, 0.9]]))
    sampled = torch.log(torch.tensor([[0.4, 0.2, 0.5], [0.1, 0.0, 0.9]]))
    mask = torch.tensor([[True, True, True], [True, False, True]])
    weights = importance_weights(trained, sampled, mask, cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([[0.5, 2.0, 1.0], [1.0, 0.0, 1.0]]))
