"""Greedy tokens of every family, in fp32, on two ranks under every ZeRO stage, with and without adapters."""

import json
from pathlib import Path

from ranks import run_ranks


def test_they_are_those_of_transformers_on_each_rank_alone_and_over_two(tmp_path: Path) -> None:
    run_ranks(Path(__file__).with_name("families.py"), str(tmp_path), ranks=2, timeout=280)
    facts = json.loads((tmp_path / "families.json").read_text())
    assert facts["differing"] == []
    assert facts["compared"] == 10 * 2 * 8 * 5
    assert 10 < facts["early"] < 90  # Of 100: some responses end early, some are as long as they may be.
