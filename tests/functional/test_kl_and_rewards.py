"""Divergence estimators, the adaptive coefficient, token rewards and score adjustment."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loops import poisoned, random_like, right_padded_masks, selected
from torch import Tensor

from rlhf.functional.kl import adaptive_kl_coef, kl_k1, kl_k2, kl_k3, per_sequence_kl
from rlhf.functional.rewards import adjust_scores, token_rewards


@given(mask=right_padded_masks(), seed=st.integers(0, 999))
def test_estimators_against_the_equations(mask: Tensor, seed: int) -> None:
    logprobs, reference = -random_like(mask, seed=seed).abs(), -random_like(mask, seed=seed + 1).abs()
    pairs = list(zip(logprobs.flatten().tolist(), reference.flatten().tolist(), strict=True))
    log_ratios = [ref - new for new, ref in pairs]
    assert kl_k1(logprobs, reference).flatten().tolist() == pytest.approx([-x for x in log_ratios])
    assert kl_k2(logprobs, reference).flatten().tolist() == pytest.approx([x * x / 2 for x in log_ratios])
    assert kl_k3(logprobs, reference).flatten().tolist() == pytest.approx([math.exp(x) - 1 - x for x in log_ratios])


def test_expectations_are_the_divergence() -> None:
    policy, reference = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.4, 0.4, 0.2]).double()
    divergence = sum(p * math.log(p / q) for p, q in zip(policy.tolist(), reference.tolist(), strict=True))
    for estimator in (kl_k1, kl_k3):
        assert (policy * estimator(policy.log(), reference.log())).sum().item() == pytest.approx(divergence)


def test_gradient_of_k2_is_that_of_the_divergence() -> None:
    logits = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    logprobs = logits.log_softmax(0)
    divergence = (logprobs.exp() * (logprobs - reference)).sum()
    (exact,) = torch.autograd.grad(divergence, logits, retain_graph=True)
    sampled = (logprobs.detach().exp() * kl_k2(logprobs, reference)).sum()
    (gradient,) = torch.autograd.grad(sampled, logits)
    torch.testing.assert_close(gradient, exact)


def test_k3_stays_finite() -> None:
    far = kl_k3(torch.tensor([-5000.0, 0.0]), torch.tensor([0.0, -5000.0]))
    assert far.tolist() == pytest.approx([math.exp(20) - 21, math.exp(-20) + 19], rel=1e-5)


@given(mask=right_padded_masks(allow_empty=True), seed=st.integers(0, 999))
def test_per_sequence(mask: Tensor, seed: int) -> None:
    logprobs, reference = random_like(mask, seed=seed), random_like(mask, seed=seed + 1)
    expected = [
        sum(new - ref for new, ref, flag in zip(*row, strict=True) if flag)
        for row in zip(logprobs.tolist(), reference.tolist(), mask.tolist(), strict=True)
    ]
    result = per_sequence_kl(poisoned(logprobs, mask), poisoned(reference, mask), mask)
    assert result.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("observed", "expected"), [(6.0, 0.1), (6.6, 0.101), (60.0, 0.102), (0.0, 0.098), (5.4, 0.099)]
)
def test_the_coefficient_follows_the_target(observed: float, expected: float) -> None:
    result = adaptive_kl_coef(0.1, observed_kl=observed, target=6.0, horizon=1000, num_sequences=100)
    assert result == pytest.approx(expected)


@given(mask=right_padded_masks(), seed=st.integers(0, 999), kl_coef=st.floats(0.0, 1.0))
def test_token_rewards_against_the_equation(mask: Tensor, seed: int, kl_coef: float) -> None:
    logprobs, reference = random_like(mask, seed=seed), random_like(mask, seed=seed + 1)
    scores = random_like(mask[:, 0], seed=seed + 2)
    rewards = token_rewards(scores, poisoned(logprobs, mask), poisoned(reference, mask), mask, kl_coef=kl_coef)
    for b, flags in enumerate(mask.tolist()):
        last = sum(flags) - 1
        for t, flag in enumerate(flags):
            expected = -kl_coef * (logprobs[b, t].item() - reference[b, t].item()) if flag else 0.0
            expected += scores[b].item() if t == last else 0.0
            assert rewards[b, t].item() == pytest.approx(expected, abs=1e-12)


def test_the_score_lands_on_eos() -> None:
    mask = torch.tensor([[True, True, True, False], [True, False, False, False], [True, True, True, True]])
    zeros = torch.zeros(3, 4)
    rewards = token_rewards(torch.tensor([1.0, 2.0, 3.0]), zeros, zeros, mask, kl_coef=0.1)
    assert rewards.tolist() == [[0, 0, 1, 0], [2, 0, 0, 0], [0, 0, 0, 3]]


def test_a_response_without_tokens_gets_no_reward() -> None:
    mask = torch.tensor([[False, False], [True, False]])
    rewards = token_rewards(torch.tensor([7.0, 1.0]), torch.zeros(2, 2), torch.zeros(2, 2), mask, kl_coef=0.1)
    assert rewards.tolist() == [[0, 0], [1, 0]]


@given(mask=right_padded_masks(), seed=st.integers(0, 999), kl_coef=st.floats(0.0, 1.0))
def test_rewards_add_up_to_score_minus_divergence(mask: Tensor, seed: int, kl_coef: float) -> None:
    logprobs, reference = random_like(mask, seed=seed), random_like(mask, seed=seed + 1)
    scores = random_like(mask[:, 0], seed=seed + 2)
    rewards = token_rewards(scores, logprobs, reference, mask, kl_coef=kl_coef)
    torch.testing.assert_close(rewards.sum(dim=1), scores - kl_coef * per_sequence_kl(logprobs, reference, mask))
    assert len(selected(rewards.tolist(), mask.tolist())) == int(mask.sum())


@given(
    rows=st.lists(st.tuples(st.floats(-50, 50), st.booleans()), min_size=1, max_size=5),
    mean=st.floats(-3, 3),
    std=st.floats(0.1, 5),
    clip=st.none() | st.floats(0.5, 5),
    penalty=st.floats(0, 3),
)
def test_adjusted_scores(
    rows: list[tuple[float, bool]], mean: float, std: float, clip: float | None, penalty: float
) -> None:
    expected = []
    for score, ended in rows:
        value = (score - mean) / std
        if clip is not None:
            value = min(max(value, -clip), clip)
        expected.append(value if ended else value - penalty)
    scores = torch.tensor([row[0] for row in rows], dtype=torch.float64)
    result = adjust_scores(
        scores, torch.tensor([row[1] for row in rows]), mean=mean, std=std, clip=clip, missing_eos_penalty=penalty
    )
    assert result.tolist() == pytest.approx(expected, abs=1e-9)


def test_clipping_does_not_hide_the_penalty() -> None:
    result = adjust_scores(
        torch.tensor([100.0, -100.0]),
        torch.tensor([False, False]),
        mean=0.0,
        std=1.0,
        clip=5.0,
        missing_eos_penalty=1.0,
    )
    assert result.tolist() == [4.0, -6.0]


def test_a_deviation_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="std=0"):
        adjust_scores(
            torch.ones(1), torch.ones(1, dtype=torch.bool), mean=0.0, std=0.0, clip=None, missing_eos_penalty=0.0
        )
