"""The losses against plain loops; what lies outside the mask has no influence; EOS has a gradient."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loops import poisoned, policy_loss_loop, random_like, right_padded_masks, selected, value_loss_loop
from torch import Tensor

from rlhf.functional.advantages import gae
from rlhf.functional.logprobs import token_logprobs
from rlhf.functional.losses import dpo_loss, policy_loss, preference_loss, sft_loss, value_loss
from rlhf.functional.masking import response_mask_from_ids
from rlhf.functional.rewards import token_rewards

seeds = st.integers(0, 999)
masks = right_padded_masks(allow_empty=True)


def _kept(mask: Tensor, *parts: Tensor) -> list[list[float]]:
    return [selected(part.tolist(), mask.tolist()) for part in parts]


@given(mask=masks, seed=seeds, clip_range=st.floats(0.05, 0.5), dual_clip=st.none() | st.floats(1.1, 4.0))
def test_policy_loss_against_a_loop(mask: Tensor, seed: int, clip_range: float, dual_clip: float | None) -> None:
    new, old, advantages = (random_like(mask, seed=seed + k) for k in range(3))
    loss, stats = policy_loss(
        poisoned(new, mask),
        poisoned(old, mask),
        poisoned(advantages, mask),
        mask,
        clip_range=clip_range,
        dual_clip=dual_clip,
    )
    kept_new, kept_old, kept_advantages = _kept(mask, new, old, advantages)
    expected, clipped = policy_loss_loop(
        kept_new, kept_old, kept_advantages, clip_range=clip_range, dual_clip=dual_clip
    )
    log_ratios = [a - b for a, b in zip(kept_new, kept_old, strict=True)]
    assert loss.item() == pytest.approx(expected, abs=1e-9)
    assert stats.clipped.item() == clipped
    assert stats.ratio.item() == pytest.approx(sum(math.exp(x) for x in log_ratios))
    assert stats.max_ratio_error.item() == pytest.approx(max((abs(math.exp(x) - 1) for x in log_ratios), default=0.0))
    assert stats.approx_kl.item() == pytest.approx(sum(math.exp(x) - 1 - x for x in log_ratios), abs=1e-9)


def test_the_first_update_is_the_plain_policy_gradient() -> None:
    mask = torch.tensor([[True, True, True], [True, True, False]])
    logprobs, advantages = random_like(mask, seed=1).requires_grad_(), random_like(mask, seed=2)
    loss, stats = policy_loss(logprobs, logprobs.detach(), advantages, mask, clip_range=0.2, dual_clip=3.0)
    loss.backward()
    assert stats.max_ratio_error.item() == 0.0
    assert stats.clipped.item() == 0.0
    assert stats.ratio.item() == 5.0
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, torch.where(mask, -advantages, 0.0))


@pytest.mark.parametrize(
    ("advantage", "log_ratio", "moves"), [(1, 0.5, False), (1, -0.5, True), (-1, 0.5, True), (-1, -0.5, False)]
)
def test_clipping_stops_only_what_has_gone_far_enough(advantage: int, log_ratio: float, moves: bool) -> None:
    logprobs = torch.tensor([[log_ratio]], requires_grad=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss, stats = policy_loss(logprobs, torch.zeros(1, 1), torch.tensor([[float(advantage)]]), mask, clip_range=0.2)
    loss.backward()
    assert logprobs.grad is not None
    assert (logprobs.grad.item() != 0) == moves
    assert stats.clipped.item() == (not moves)


def test_a_huge_ratio_stays_finite() -> None:
    logprobs = torch.tensor([[0.0, -900.0]], requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss, stats = policy_loss(
        logprobs, torch.tensor([[-900.0, 0.0]]), torch.tensor([[-1.0, -1.0]]), mask, clip_range=0.2
    )
    loss.backward()
    assert loss.item() == pytest.approx(math.exp(20) + 0.8, rel=1e-6)
    assert stats.approx_kl.isfinite()
    assert logprobs.grad is not None
    assert torch.all(logprobs.grad.isfinite())


@given(mask=masks, seed=seeds, value_clip_range=st.floats(0.05, 1.0))
def test_value_loss_against_a_loop(mask: Tensor, seed: int, value_clip_range: float) -> None:
    values, old_values, returns = (random_like(mask, seed=seed + k) for k in range(3))
    loss, stats = value_loss(
        poisoned(values, mask),
        poisoned(old_values, mask),
        poisoned(returns, mask),
        mask,
        value_clip_range=value_clip_range,
    )
    kept = _kept(mask, values, old_values, returns)
    expected, clipped = value_loss_loop(*kept, value_clip_range=value_clip_range)
    assert loss.item() == pytest.approx(expected, abs=1e-9)
    assert stats.clipped.item() == clipped


@given(mask=masks, seed=seeds)
def test_gradients_outside_the_mask_are_zero(mask: Tensor, seed: int) -> None:
    leaves = [poisoned(random_like(mask, seed=seed + k), mask).requires_grad_() for k in range(3)]
    others = [poisoned(random_like(mask, seed=seed + k), mask) for k in range(3, 5)]
    policy, _ = policy_loss(leaves[0], *others, mask, clip_range=0.2)
    value, _ = value_loss(leaves[1], *others, mask, value_clip_range=0.2)
    (policy + value + sft_loss(leaves[2], mask)).backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert torch.all(leaf.grad[~mask] == 0)
        assert torch.all(leaf.grad[mask].isfinite())


@given(
    pairs=st.lists(st.tuples(*(st.floats(-30, 30),) * 3), min_size=1, max_size=5),
    centering_coef=st.floats(0, 0.1),
    use_margin=st.booleans(),
)
def test_preference_loss_against_a_loop(
    pairs: list[tuple[float, float, float]], centering_coef: float, use_margin: bool
) -> None:
    chosen, rejected, margin = torch.tensor(pairs, dtype=torch.float32).unbind(dim=1)
    expected = 0.0
    for good, bad, gap in zip(chosen.tolist(), rejected.tolist(), margin.tolist(), strict=True):
        difference = good - bad - (gap if use_margin else 0.0)
        expected += math.log1p(math.exp(-abs(difference))) + max(-difference, 0.0) + centering_coef * (good + bad) ** 2
    loss, stats = preference_loss(
        chosen, rejected, centering_coef=centering_coef, margin=margin if use_margin else None
    )
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert stats.correct.item() == sum(g > b for g, b in zip(chosen.tolist(), rejected.tolist(), strict=True))
    assert stats.margin.item() == pytest.approx(sum((chosen - rejected).tolist()), rel=1e-4, abs=1e-3)


def test_preference_loss_is_computed_in_fp32() -> None:
    chosen = torch.tensor([300.0, 1.0], dtype=torch.bfloat16, requires_grad=True)
    loss, stats = preference_loss(chosen, torch.tensor([-300.0, 1.0], dtype=torch.bfloat16), centering_coef=0.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log(2))
    assert stats.correct.item() == 1.0
    loss.backward()
    assert chosen.grad is not None
    assert chosen.grad.tolist() == [0.0, -0.5]


@given(mask=masks, seed=seeds)
def test_sft_loss(mask: Tensor, seed: int) -> None:
    logprobs = random_like(mask, seed=seed)
    expected = -sum(selected(logprobs.tolist(), mask.tolist()))
    assert sft_loss(poisoned(logprobs, mask), mask).item() == pytest.approx(expected, abs=1e-12)


def test_eos_is_rewarded_and_has_a_gradient() -> None:
    eos, vocabulary = 2, 5
    ids = torch.tensor([[4, 3, eos, 0], [eos, 0, 0, 0]])
    mask = response_mask_from_ids(ids, eos_id=eos)
    logits = torch.randn(2, 4, vocabulary, generator=torch.Generator().manual_seed(0)).requires_grad_()
    logprobs = token_logprobs(logits, ids)
    old = logprobs.detach()
    rewards = token_rewards(torch.tensor([1.0, 1.0]), old, old, mask, kl_coef=0.05)
    assert (rewards != 0).tolist() == [[False, False, True, False], [True, False, False, False]]
    advantages, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma=1.0, gae_lambda=0.95)
    policy_loss(logprobs, old, advantages, mask, clip_range=0.2)[0].backward()
    assert logits.grad is not None
    assert logits.grad[0, 2, eos] < 0
    assert logits.grad[1, 0, eos] < 0
    assert torch.all(logits.grad[~mask] == 0)


@given(
    mask=right_padded_masks(),
    seed=st.integers(0, 999),
    beta=st.floats(0.05, 2.0),
    smoothing=st.floats(0.0, 0.4),
    kind=st.sampled_from(["sigmoid", "ipo"]),
)
def test_dpo_loss_against_a_loop(mask: Tensor, seed: int, beta: float, smoothing: float, kind: str) -> None:
    both = torch.cat([mask, mask.flip(0)])
    ratios = random_like(both, seed=seed).float()
    loss, stats = dpo_loss(poisoned(ratios, both), both, beta=beta, label_smoothing=smoothing, kind=kind)
    totals = [
        sum(row[kept].tolist()) / (int(kept.sum()) if kind == "ipo" else 1)
        for row, kept in zip(ratios, both, strict=True)
    ]
    chosen, rejected = totals[: len(mask)], totals[len(mask) :]
    expected = 0.0
    for better, worse in zip(chosen, rejected, strict=True):
        gap = better - worse
        if kind == "ipo":
            expected += (gap - 1 / (2 * beta)) ** 2
        else:
            expected += (1 - smoothing) * math.log1p(math.exp(-beta * gap)) + smoothing * math.log1p(
                math.exp(beta * gap)
            )
    assert float(loss) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert float(stats.correct) == sum(better > worse for better, worse in zip(chosen, rejected, strict=True))
    gaps = sum(better - worse for better, worse in zip(chosen, rejected, strict=True))
    assert float(stats.margin) == pytest.approx(beta * gaps, rel=1e-4, abs=1e-4)


def test_dpo_pushes_chosen_up_and_rejected_down() -> None:
    ratios = torch.zeros(2, 3, requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    loss, _ = dpo_loss(ratios, mask, beta=0.2)
    loss.backward()
    assert ratios.grad is not None
    assert ratios.grad.tolist() == [pytest.approx([-0.1, -0.1, 0.0]), pytest.approx([0.1, 0.0, 0.0])]
    with pytest.raises(ValueError, match="kind=hinge: there are sigmoid and ipo"):
        dpo_loss(ratios, mask, beta=0.2, kind="hinge")
