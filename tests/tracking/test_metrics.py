"""Metrics over ranks: sums and counts, never means of means."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf.tracking.metrics import MetricAccumulator


def flush_together(ranks: list[MetricAccumulator]) -> list[dict[str, float]]:
    """Flush several ranks' accumulators: the first pass collects what each rank sends, the second one replies."""
    sent_sums, sent_maxima = {}, {}
    originals = [(dict(rank._totals), dict(rank._counts), dict(rank._maxima)) for rank in ranks]

    def record(store: dict[int, Tensor], index: int) -> Callable[[Tensor], Tensor]:
        def reduce(tensor: Tensor) -> Tensor:
            store[index] = tensor.clone()
            return tensor.clone()

        return reduce

    for index, rank in enumerate(ranks):
        rank.flush(record(sent_sums, index), record(sent_maxima, index))
        rank._totals, rank._counts, rank._maxima = originals[index]
    total = torch.stack(list(sent_sums.values())).sum(0)

    def highest(_: Tensor) -> Tensor:
        return torch.stack(list(sent_maxima.values())).max(0).values

    return [rank.flush(lambda _: total.clone(), highest) for rank in ranks]


def test_one_rank_gives_total_over_count() -> None:
    metrics = MetricAccumulator()
    metrics.add("train/loss", 6.0, 3)
    metrics.add("train/loss", torch.tensor(4.0), torch.tensor(2))
    metrics.add("train/steps", 5.0)
    metrics.maximum("train/largest", 1.0)
    metrics.maximum("train/largest", torch.tensor(-3.0))
    assert metrics.flush() == {"train/loss": 2.0, "train/steps": 5.0, "train/largest": 1.0}


def test_flush_forgets() -> None:
    metrics = MetricAccumulator()
    metrics.add("train/loss", 1.0)
    metrics.flush()
    assert metrics.flush() == {}


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.floats(-1e3, 1e3), st.integers(0, 50)), min_size=1, max_size=4), min_size=1, max_size=8
    )
)
def test_uneven_ranks_give_the_mean_over_all_items(ranks: list[list[tuple[float, int]]]) -> None:
    accumulators = []
    for calls in ranks:
        metrics = MetricAccumulator()
        for total, count in calls:
            metrics.add("train/loss", torch.tensor(total, dtype=torch.float64), count)
            metrics.maximum("train/peak", total)
        accumulators.append(metrics)
    results = flush_together(accumulators)
    items = sum(count for calls in ranks for _, count in calls)
    total = math.fsum(total for calls in ranks for total, _ in calls)
    for result in results:
        assert result["train/peak"] == max(total for calls in ranks for total, _ in calls)
        if items:
            assert result["train/loss"] == pytest.approx(total / items, rel=1e-9, abs=1e-9)
        else:
            assert not math.isfinite(result["train/loss"])


def test_ranks_that_added_other_names_are_told_before_any_value_is_used() -> None:
    first, second = MetricAccumulator(), MetricAccumulator()
    first.add("train/loss", 1.0)
    second.add("train/loss", 1.0)
    second.add("train/kl", 1.0)
    with pytest.raises(ValueError, match=r"different metrics.*This rank added: train/loss"):
        flush_together([first, second])


def test_a_maximum_on_one_rank_only_is_an_error_too() -> None:
    first, second = MetricAccumulator(), MetricAccumulator()
    first.add("train/loss", 1.0)
    first.maximum("train/peak", 1.0)
    second.add("train/loss", 1.0)
    with pytest.raises(ValueError, match="different metrics"):
        flush_together([first, second])


def test_names_in_another_order_are_the_same_names() -> None:
    first, second = MetricAccumulator(), MetricAccumulator()
    first.add("train/a", 1.0)
    first.add("train/b", 10.0)
    second.add("train/b", 30.0)
    second.add("train/a", 3.0)
    assert flush_together([first, second])[0] == {"train/a": 2.0, "train/b": 20.0}


def test_one_collective_per_flush() -> None:
    calls = []

    def reduce(tensor: Tensor) -> Tensor:
        calls.append(tensor.shape)
        return tensor

    metrics = MetricAccumulator()
    for index in range(10):
        metrics.add(f"train/{index}", float(index), 2)
    metrics.flush(reduce, reduce)
    assert len(calls) == 1


def test_a_tensor_of_several_elements_is_refused() -> None:
    with pytest.raises(ValueError, match="train/loss"):
        MetricAccumulator().add("train/loss", torch.zeros(3))


def test_too_many_metrics_are_refused() -> None:
    metrics = MetricAccumulator()
    for index in range(1000):
        metrics.add(f"train/{index}", 1.0)
    with pytest.raises(ValueError, match="1000 metrics"):
        metrics.flush()


def test_no_gradient_graph_is_kept() -> None:
    weight = torch.ones(1, requires_grad=True)
    metrics = MetricAccumulator()
    metrics.add("train/loss", (weight * 3).sum())
    assert not any(total.requires_grad for total in metrics._totals.values())
    assert metrics.flush()["train/loss"] == 3.0
