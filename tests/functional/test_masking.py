"""Sums, means, whitening, positions and the response mask."""

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loops import any_masks, poisoned, random_like, selected
from torch import Tensor

from rlhf.functional.masking import (
    last_true_index,
    left_aligned,
    masked_moments,
    masked_sum,
    masked_whiten,
    position_ids,
    response_mask_from_ids,
)


@given(mask=any_masks(), seed=st.integers(0, 999))
def test_sum_mean_and_moments(mask: Tensor, seed: int) -> None:
    values = random_like(mask, seed=seed)
    kept = selected(values.tolist(), mask.tolist())
    bad = poisoned(values, mask)
    assert masked_sum(bad, mask).item() == pytest.approx(sum(kept), abs=1e-12)
    mean, variance = masked_moments(bad, mask)
    assert mean.item() == pytest.approx(statistics.fmean(kept) if kept else 0.0, abs=1e-12)
    assert variance.item() == pytest.approx(statistics.pvariance(kept) if kept else 0.0, abs=1e-12)


@given(mask=any_masks(), seed=st.integers(0, 999), shift_mean=st.booleans())
def test_whitening(mask: Tensor, seed: int, shift_mean: bool) -> None:
    values = random_like(mask, seed=seed) + 3.0
    kept = selected(values.tolist(), mask.tolist())
    mean, variance = masked_moments(poisoned(values, mask), mask)
    result = masked_whiten(poisoned(values, mask), mask, mean=mean, variance=variance, shift_mean=shift_mean)
    assert torch.all(result[~mask] == 0)
    if kept:
        centre, spread = statistics.fmean(kept), (statistics.pvariance(kept) + 1e-8) ** 0.5
        expected = [(x - centre) / spread + (0.0 if shift_mean else centre) for x in kept]
        assert selected(result.tolist(), mask.tolist()) == pytest.approx(expected, abs=1e-7)


@given(mask=any_masks(), seed=st.integers(0, 999), cut=st.integers(0, 4))
def test_whitening_over_two_ranks_is_whitening_of_the_whole(mask: Tensor, seed: int, cut: int) -> None:
    values = poisoned(random_like(mask, seed=seed) * 2 + 5, mask)
    mean, variance = masked_moments(values, mask)
    whole = masked_whiten(values, mask, mean=mean, variance=variance)
    rows = (slice(None, cut), slice(cut, None))

    def rank_moments(rank: int) -> tuple[Tensor, Tensor]:
        """What a rank sees when the other one's sums are added to its own in each of the two reductions."""
        others = iter(_sums(values[rows[1 - rank]], mask[rows[1 - rank]], mean))
        return masked_moments(values[rows[rank]], mask[rows[rank]], all_reduce=lambda sums: sums + next(others))

    parts = []
    for rank in (0, 1):
        its_mean, its_variance = rank_moments(rank)
        parts.append(masked_whiten(values[rows[rank]], mask[rows[rank]], mean=its_mean, variance=its_variance))
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-7)


def _sums(values: Tensor, mask: Tensor, mean: Tensor) -> list[Tensor]:
    kept = values[mask]
    first = torch.tensor([float(kept.sum()), float(mask.sum())], dtype=torch.float64)
    return [first, ((kept - mean) ** 2).sum().reshape(1)]


def test_whitening_keeps_precision_far_from_zero() -> None:
    values = torch.tensor([[10000.0, 10001.0, 10002.0]])
    mask = torch.ones_like(values, dtype=torch.bool)
    mean, variance = masked_moments(values, mask)
    assert variance.item() == pytest.approx(2 / 3)
    assert masked_whiten(values, mask, mean=mean, variance=variance)[0].tolist() == pytest.approx(
        [-(1.5**0.5), 0.0, 1.5**0.5], abs=1e-6
    )


@given(mask=any_masks())
def test_last_true_index(mask: Tensor) -> None:
    expected = [max((t for t, flag in enumerate(row) if flag), default=0) for row in mask.tolist()]
    assert last_true_index(mask).tolist() == expected


@given(mask=any_masks())
def test_position_ids(mask: Tensor) -> None:
    expected = []
    for row in mask.tolist():
        seen, positions = 0, []
        for flag in row:
            seen += flag
            positions.append(max(seen - 1, 0))
        expected.append(positions)
    assert position_ids(mask).tolist() == expected


def test_positions_start_at_the_first_real_token() -> None:
    mask = torch.tensor([[False, False, True, True], [True, True, True, False]])
    assert position_ids(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]


@given(
    rows=st.integers(1, 6).flatmap(lambda n: st.lists(st.lists(st.integers(0, 3), min_size=n, max_size=n), min_size=1))
)
def test_response_mask_ends_with_the_first_eos(rows: list[list[int]]) -> None:
    eos = 2
    expected = [[eos not in row[:t] for t in range(len(row))] for row in rows]
    assert response_mask_from_ids(torch.tensor(rows), eos_id=eos).tolist() == expected


def test_a_second_eos_is_outside_and_no_eos_means_all() -> None:
    ids = torch.tensor([[5, 2, 2, 7], [5, 6, 7, 8], [2, 5, 5, 5]])
    assert response_mask_from_ids(ids, eos_id=2).tolist() == [
        [True, True, False, False],
        [True, True, True, True],
        [True, False, False, False],
    ]


@given(lengths=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 5)), min_size=1, max_size=4))
def test_left_aligned_keeps_tokens_and_order(lengths: list[tuple[int, int]]) -> None:
    """Rows with some padding on the left, and what is left over on the right."""
    ids = torch.arange(1, 9 * len(lengths) + 1).view(len(lengths), 9)
    places = torch.arange(9)
    mask = torch.stack([(places >= skipped) & (places < skipped + real) for skipped, real in lengths])
    moved, moved_mask = left_aligned(ids, mask)
    assert moved.shape == moved_mask.shape == (len(lengths), max(real for _, real in lengths))
    for row, (_, real) in enumerate(lengths):
        assert moved[row, :real].tolist() == ids[row][mask[row]].tolist()
        assert moved_mask[row].tolist() == [place < real for place in range(moved.shape[1])]
