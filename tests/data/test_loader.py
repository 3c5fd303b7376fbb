"""Padding, and batches that are the same for any number of ranks and after a restart."""

import operator
from functools import partial, reduce
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.config.errors import DataError
from rlhf.data.collate import collate_pairs, collate_prompts, collate_sft
from rlhf.data.loader import GlobalLoader, eval_batches

PAD = 0
ROWS = [
    {"prompt_ids": [5, PAD], "chosen_ids": [7, PAD, 9], "rejected_ids": [8], "messages": [], "source": "a"},
    {"prompt_ids": [6], "chosen_ids": [9], "rejected_ids": [7, 7, 7, 9], "messages": [], "source": "b"},
]


def rows_of(count: int) -> Dataset:
    lengths = np.random.default_rng(0).integers(1, 60, count)
    return Dataset.from_dict(
        {
            "prompt_ids": [[n, 1] for n in range(count)],
            "chosen_ids": [[2] * int(length) for length in lengths],
            "rejected_ids": [[3] if n % 2 else None for n in range(count)],
        }
    )


def numbers(rows: list[dict[str, Any]]) -> list[int]:
    return [row["prompt_ids"][0] for row in rows]


def loader(dataset: Dataset, **changes: Any) -> GlobalLoader[list[int]]:
    options: dict[str, Any] = {"batch_size": 8, "seed": 3, "rank": 0, "ranks": 1, "epochs": 1.0, **changes}
    return GlobalLoader(dataset, collate=numbers, **options)


def test_prompts_are_padded_on_the_left_and_masked_by_length() -> None:
    batch = collate_prompts(ROWS, pad_id=PAD)
    assert batch.prompt_ids.tolist() == [[5, PAD], [PAD, 6]]
    assert batch.prompt_mask.tolist() == [[True, True], [False, True]]
    assert [record["source"] for record in batch.records] == ["a", "b"]


def test_sft_targets_are_the_answer_with_eos() -> None:
    batch = collate_sft(ROWS, pad_id=PAD)
    assert batch.sequence_ids.tolist() == [[5, PAD, 7, PAD, 9], [6, 9, PAD, PAD, PAD]]
    assert batch.attention_mask.sum(dim=1).tolist() == [5, 2]
    assert batch.loss_mask.int().tolist() == [[0, 0, 1, 1, 1], [0, 1, 0, 0, 0]]


def test_pairs_have_one_length() -> None:
    batch = collate_pairs(ROWS, pad_id=PAD)
    assert batch.chosen_ids.shape == batch.rejected_ids.shape == (2, 5)
    assert batch.chosen_mask.sum(dim=1).tolist() == [5, 2]
    assert batch.rejected_ids.tolist() == [[5, PAD, 8, PAD, PAD], [6, 7, 7, 7, 9]]
    assert batch.rejected_mask.sum(dim=1).tolist() == [3, 5]


@settings(max_examples=30, deadline=None)
@given(st.integers(8, 300), st.sampled_from([1, 2, 4, 8]), st.integers(0, 3))
def test_ranks_share_out_the_same_global_batches(rows: int, ranks: int, seed: int) -> None:
    dataset = rows_of(rows)
    alone = list(loader(dataset, seed=seed, epochs=2.0))
    shares = [list(loader(dataset, seed=seed, epochs=2.0, rank=rank, ranks=ranks)) for rank in range(ranks)]
    assert [reduce(operator.iadd, parts, []) for parts in zip(*shares, strict=True)] == alone
    for epoch in (alone[: rows // 8], alone[rows // 8 :]):
        seen = reduce(operator.iadd, epoch, [])
        assert len(seen) == len(set(seen)) == rows // 8 * 8


def test_epochs_and_seeds_differ_and_repeat() -> None:
    dataset = rows_of(200)
    two = list(loader(dataset, epochs=2.0))
    assert len(loader(dataset, epochs=2.0)) == len(two) == 50
    assert two[:25] != two[25:]
    assert two == list(loader(dataset, epochs=2.0))
    assert two != list(loader(dataset, epochs=2.0, seed=4))
    assert next(iter(loader(dataset, shuffle=False))) == list(range(8))
    assert len(loader(dataset, epochs=0.5)) == 12


@pytest.mark.parametrize("stop", [0, 3, 25, 30, 50])
def test_a_restored_loader_goes_on_where_it_stood(stop: int) -> None:
    dataset = rows_of(200)
    whole = list(loader(dataset, epochs=2.0))
    first = loader(dataset, epochs=2.0)
    iterator = iter(first)
    before = [next(iterator) for _ in range(stop)]
    second = loader(dataset, epochs=2.0)
    second.load_state_dict(first.state_dict())
    assert before + list(second) == whole


def test_a_state_may_change_ranks_but_not_data() -> None:
    dataset = rows_of(200)
    first = loader(dataset)
    next(iter(first))
    second = loader(dataset, rank=1, ranks=2)
    second.load_state_dict(first.state_dict())
    assert next(iter(second)) == list(loader(dataset))[1][4:]
    with pytest.raises(ValueError, match="seed: 3 then, 4 now"):
        loader(dataset, seed=4).load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="rows: 200 then, 100 now"):
        loader(rows_of(100)).load_state_dict(first.state_dict())


def test_an_endless_loader_starts_new_epochs() -> None:
    endless = loader(rows_of(16), epochs=None)
    iterator = iter(endless)
    batches = [next(iterator) for _ in range(9)]
    assert sorted(batches[0] + batches[1]) == sorted(batches[6] + batches[7]) == list(range(16))
    with pytest.raises(TypeError, match="no length"):
        len(endless)


def test_batches_hold_rows_of_similar_length_in_random_order() -> None:
    dataset = rows_of(512)
    lengths = [len(row["chosen_ids"]) for row in dataset]
    batches = list(loader(dataset))
    spread = np.mean([np.ptp([lengths[n] for n in batch]) for batch in batches])
    assert spread < 10
    means = [np.mean([lengths[n] for n in batch]) for batch in batches]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.5
    halves = [np.mean([[lengths[n] for n in batch[part]] for batch in batches]) for part in (slice(4), slice(4, 8))]
    assert abs(halves[0] - halves[1]) < 1.0


def test_impossible_batches_are_refused() -> None:
    with pytest.raises(DataError, match="5 rows, fewer than one batch of 8"):
        loader(rows_of(5))
    with pytest.raises(ValueError, match="8 rows cannot be divided among 3 ranks"):
        loader(rows_of(50), ranks=3)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 5))
def test_evaluation_covers_every_row_once_in_step(rows: int, batch_size: int, ranks: int) -> None:
    dataset = rows_of(rows)
    found = [
        list(eval_batches(dataset, batch_size=batch_size, collate=numbers, rank=rank, ranks=ranks))
        for rank in range(ranks)
    ]
    # Batch by batch as many rows on every rank: then every rank makes as many forward passes of a micro-batch.
    assert len({tuple(len(batch) for batch, _ in batches) for batches in found}) == 1
    counted = [n for batches in found for batch, valid in batches for n in batch[:valid]]
    assert sorted(counted) == list(range(rows))
    assert all(1 <= len(batch) <= batch_size and valid <= len(batch) for batches in found for batch, valid in batches)


def test_a_loader_yields_tensors_of_its_rank() -> None:
    dataset = rows_of(16)
    batches = list(
        GlobalLoader(
            dataset, batch_size=8, collate=partial(collate_sft, pad_id=PAD), seed=1, rank=1, ranks=2, epochs=1.0
        )
    )
    assert len(batches) == 2 and all(len(batch) == 4 for batch in batches)
    assert all(bool(torch.equal(batch.attention_mask.any(dim=1), torch.ones(4, dtype=torch.bool))) for batch in batches)
