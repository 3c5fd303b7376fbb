"""Micro-batches of rows of similar length."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.rollout.grouping import equal_groups, least_padding, micro_batches


def _places(groups: list[list[int]], lengths: list[int]) -> int:
    return sum(len(group) * max(lengths[row] for row in group) for group in groups)


@given(lengths=st.lists(st.integers(1, 50), min_size=6, max_size=6), count=st.sampled_from([1, 2, 3, 6]))
def test_no_other_cut_has_less_padding(lengths: list[int], count: int) -> None:
    groups = least_padding(lengths, count)
    assert sorted(row for group in groups for row in group) == list(range(6))
    assert len(groups) == count
    most = 6 // count * max(lengths)
    assert all(_places([group], lengths) <= most for group in groups)
    in_order = sorted(range(6), key=lambda row: lengths[row])
    others = [
        [in_order[start:end] for start, end in itertools.pairwise((0, *cuts, 6))]
        for cuts in itertools.combinations(range(1, 6), count - 1)
    ]
    allowed = [other for other in others if all(_places([group], lengths) <= most for group in other)]
    assert _places(groups, lengths) == min(_places(other, lengths) for other in allowed)


def test_equal_lengths_make_equal_groups() -> None:
    assert [len(group) for group in least_padding([7] * 12, 3)] == [4, 4, 4]


def test_padding_of_answers_of_natural_lengths_is_below_a_tenth() -> None:
    """64 answers of 8 to 64 tokens behind prompts of 10 to 20, in micro-batches of 8."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(8, 65, (64,), generator=generator) + torch.randint(10, 21, (64,), generator=generator)
    groups = micro_batches(torch.arange(64), lengths, size=8)
    places = sum(len(group) * int(lengths[group].max()) for group in groups)
    assert 1 - int(lengths.sum()) / places < 0.1


def test_many_rows_take_little_time() -> None:
    lengths = torch.randint(1, 2000, (512,), generator=torch.Generator().manual_seed(2)).tolist()
    assert len(least_padding(lengths, 64)) == 64


def test_a_count_that_does_not_divide_the_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="5 rows cannot be 2 groups"):
        least_padding([1, 2, 3, 4, 5], 2)


def test_equal_groups_are_in_order_of_length() -> None:
    groups = equal_groups(torch.tensor([5, 1, 4, 2, 3]), 2)
    assert [group.tolist() for group in groups] == [[1, 3], [4, 2], [0]]


def test_only_the_given_rows_are_grouped() -> None:
    groups = micro_batches(torch.tensor([4, 0, 2, 5]), torch.tensor([9, 9, 1, 9, 2, 9]), size=2)
    assert [group.tolist() for group in groups] == [[2, 4], [0, 5]]
