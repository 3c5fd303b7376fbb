"""The bigram baseline against its equation."""

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import itertools

from bigram import KneserNeyBigram

VOCAB = 12


def sequences() -> list[list[int]]:
    random = np.random.default_rng(0)
    return [np.minimum(random.geometric(0.3, size=9), VOCAB - 2).tolist() for _ in range(30)]


def test_probabilities_follow_the_equation() -> None:
    model = KneserNeyBigram(sequences(), vocab_size=VOCAB)
    counts = Counter(pair for sequence in sequences() for pair in itertools.pairwise(sequence))
    once, twice = (sum(count == n for count in counts.values()) for n in (1, 2))
    d = once / (once + 2 * twice)
    assert model.discount == d
    before = Counter(word for _, word in counts)
    for v in range(VOCAB):
        total = sum(count for (first, _), count in counts.items() if first == v)
        kinds = sum(first == v for first, _ in counts)
        for w in range(VOCAB):
            q = (max(before[w] - d, 0) + d * len(before) / VOCAB) / len(counts)
            expected = q if not total else (max(counts[v, w] - d, 0) + d * kinds * q) / total
            got = model.probabilities(np.array([v]), np.array([w]))[0]
            assert got == pytest.approx(expected, rel=1e-12)


def test_every_distribution_sums_to_one() -> None:
    model = KneserNeyBigram(sequences(), vocab_size=VOCAB)
    for v in range(VOCAB):
        total = model.probabilities(np.full(VOCAB, v), np.arange(VOCAB)).sum()
        assert total == pytest.approx(1.0, abs=1e-12)


def test_perplexity_counts_response_tokens_only() -> None:
    model = KneserNeyBigram(sequences(), vocab_size=VOCAB)
    p = [model.probabilities(np.array([a]), np.array([b]))[0] for a, b in ((2, 3), (3, 1), (5, 4))]
    expected = np.prod(p) ** (-1 / 3)
    assert model.perplexity([[9, 2], [5]], [[3, 1], [4]]) == pytest.approx(expected, rel=1e-12)
