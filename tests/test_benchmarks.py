"""What the benchmarks compute from the runs that they read."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from algorithms import JUDGE, KL, SCORE, at_score, verdicts
from machine import processor
from ptx import TEXT, row
from quality import goals


def _curve(*points: tuple[float, float]) -> list[dict[str, float]]:
    """Evaluations with the given KL and score; the loss on text rises with the KL."""
    return [
        {"step": float(step), KL: kl, SCORE: score, JUDGE: 0.9, TEXT: 4 + kl / 10}
        for step, (kl, score) in enumerate(points)
    ]


def test_a_processor_is_told_by_its_kind_and_its_instructions() -> None:
    assert processor("model name\t: AMD Ryzen\nflags\t\t: sse avx2 sha_ni\n").endswith("CPU cores (AMD Ryzen; AVX2)")
    assert processor("flags : avx2 avx512f amx_tile\nmodel name : Xeon\n").endswith("(Xeon; AVX2, AVX-512, AMX)")
    assert "; " not in processor("")


def test_the_kl_at_a_score_lies_between_evaluations() -> None:
    curve = _curve((0.0, 0.0), (2.0, 1.0), (6.0, 2.0))
    assert at_score(curve, 1.5, KL) == pytest.approx(4.0)
    assert at_score(curve, 1.0, KL) == pytest.approx(2.0)
    assert at_score(curve, 2.5, KL) is None


def test_ppo_is_held_against_the_best_of_eight() -> None:
    best = [{"step": n, SCORE: score, JUDGE: 0.9, KL: 1.0} for n, score in ((4, 1.0), (8, 1.5), (16, 2.0))]
    assert all(verdicts({"ppo": _curve((0.0, 0.0), (3.0, 1.6)), "best_of_n": best}).values())
    assert not all(verdicts({"ppo": _curve((0.0, 0.0), (3.0, 1.4)), "best_of_n": best}).values())


def test_text_losses_are_compared_at_the_score_that_both_reached() -> None:
    plain, mixed = _curve((0.0, 0.0), (4.0, 2.0)), _curve((0.0, 0.0), (3.0, 1.0))
    cells, (rise, mixed_rise) = row(1, plain, mixed)
    assert cells[1] == "1.00"
    assert (rise, mixed_rise) == pytest.approx((0.2, 0.3))


def test_each_model_has_its_goals() -> None:
    perplexity = "perplexity of the answers under the SFT model"
    figures = {
        "perplexity before": 2000.0,
        "perplexity after": 100.0,
        "bigram perplexity": 110.0,
        "RM accuracy": 0.75,
        "score rise in SFT standard deviations": 2.0,
        "judge positive before (%)": 60.0,
        "judge positive after (%)": 90.0,
        "length change (%)": 5.0,
        "EOS rate after (%)": 99.0,
        "KL per sequence": 10.0,
        f"{perplexity} before": 50.0,
        f"{perplexity} after": 90.0,
        "launch.py seconds": 3000.0,
    }
    assert all(goals(figures, model="tiny", kl_budget=15.0).values())
    missed = [goal for goal, met in goals(figures, model="smollm2-135m", kl_budget=15.0).items() if not met]
    assert missed == ["RM accuracy at least 0.80"]
