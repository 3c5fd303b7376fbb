"""Scores: normalised, clipped, scaled, punished."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf.batch import Rollout
from rlhf.functional.rewards import repeated_share
from rlhf.rollout.shaping import RunningMoments, ScoreShaping


def shaping(**given: object) -> ScoreShaping:
    defaults: dict[str, object] = {
        "clip": None,
        "scale": 1.0,
        "missing_eos_penalty": 0.0,
        "length_penalty": 0.0,
        "length_limit": 0,
        "repetition_penalty": 0.0,
        "repetition_ngram": 2,
    }
    return ScoreShaping(**defaults | given)  # type: ignore[arg-type]


def rollout(*responses: list[int]) -> Rollout:
    width = max(len(response) for response in responses)
    ids = torch.tensor([[7, *response, *[0] * (width - len(response))] for response in responses])
    mask = torch.arange(width) < torch.tensor([len(response) for response in responses]).unsqueeze(1)
    return Rollout(sequence_ids=ids, prompt_mask=torch.ones(len(responses), 1, dtype=torch.bool), response_mask=mask)


def same(values: Tensor) -> Tensor:
    return values.clone()


def test_penalties_come_after_clipping_and_scaling() -> None:
    answers = rollout([1, 2, 3, 4], [1, 2, 1, 2, 1])
    scores = shaping(
        clip=2.0, scale=3.0, missing_eos_penalty=1.0, length_penalty=0.5, length_limit=3, repetition_penalty=4.0
    )(torch.tensor([9.0, -1.0]), answers, torch.tensor([False, True]), all_reduce=same)
    # 3·2 - 1 - 0.5·1 - 0, and 3·(-1) - 0.5·2 - 4·(2 of the 4 pairs occurred before)
    assert scores.tolist() == pytest.approx([4.5, -6.0])


@pytest.mark.parametrize(
    ("ids", "ngram", "share"), [([1, 1, 1, 1], 1, 0.75), ([1, 2, 1, 2], 2, 1 / 3), ([1, 2], 3, 0.0), ([], 1, 0.0)]
)
def test_share_of_repeated_ngrams(ids: list[int], ngram: int, share: float) -> None:
    row, mask = torch.tensor([[*ids, 1, 1]]), torch.tensor([[True] * len(ids) + [False, False]])
    assert repeated_share(row, mask, ngram=ngram).tolist() == pytest.approx([share])


@given(st.lists(st.lists(st.floats(-100, 100), min_size=1, max_size=6), min_size=1, max_size=5))
def test_running_moments_are_those_of_all_scores_so_far(batches: list[list[float]]) -> None:
    moments = RunningMoments()
    for batch in batches:
        moments.update(torch.tensor(batch, dtype=torch.float64), all_reduce=same)
    everything = torch.tensor([value for batch in batches for value in batch], dtype=torch.float64)
    assert moments.mean == pytest.approx(float(everything.mean()), abs=1e-9)
    deviation = float(everything.std(correction=0))
    assert moments.std == pytest.approx(deviation if deviation > 1e-7 else moments.std, abs=1e-6)


def test_running_moments_leave_out_what_is_not_finite() -> None:
    moments = RunningMoments()
    moments.update(torch.tensor([torch.nan, torch.inf]), all_reduce=same)
    assert (moments.count, moments.mean, moments.std) == (0.0, 0.0, 1.0)
    moments.update(torch.tensor([1.0, torch.nan, 3.0]), all_reduce=same)
    assert (moments.count, moments.mean, moments.std) == (2.0, 2.0, 1.0)


def test_running_moments_normalise_over_all_ranks() -> None:
    # Two ranks with the same numbers: sums double, so that mean and deviation are the same as of one.
    shaped = shaping(running=RunningMoments())
    answers, ended = rollout([1], [2]), torch.tensor([True, True])
    scores = shaped(torch.tensor([2.0, 4.0]), answers, ended, all_reduce=lambda values: 2 * values)
    assert scores.tolist() == pytest.approx([-1.0, 1.0]) and shaped.running is not None
    assert (shaped.running.count, shaped.running.mean) == (4.0, 3.0)
    equal = shaping(running=RunningMoments())(torch.tensor([5.0, 5.0]), answers, ended, all_reduce=same)
    assert equal.tolist() == [0.0, 0.0]
