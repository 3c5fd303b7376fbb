"""No prompt is in two parts; sources are mixed at their weights without repeating a row."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config.errors import ConfigError
from rlhf.config.schema import SplitConfig
from rlhf.data.conversation import Message
from rlhf.data.mix import mix_reports, mix_sizes
from rlhf.data.split import STAGES, assign

PROMPTS = [(Message("user", f"prompt {number}"),) for number in range(6000)]


def test_shares_are_met() -> None:
    split = SplitConfig(sft=1, rm=2, ppo=1, held_out=0.1)
    parts = [assign(prompt, split) for prompt in PROMPTS]
    shares = {stage: count / len(parts) for stage, count in Counter(part.stage for part in parts).items()}
    assert shares == pytest.approx({"sft": 0.25, "rm": 0.5, "ppo": 0.25}, abs=0.025)
    for stage in STAGES:
        held_out = [part.held_out for part in parts if part.stage == stage]
        assert sum(held_out) / len(held_out) == pytest.approx(0.1, abs=0.025)


@given(st.text(), st.integers(0, 100), st.tuples(*[st.floats(0, 10)] * 3).filter(any), st.floats(0, 1))
def test_a_prompt_has_one_part_that_has_a_share(
    text: str, seed: int, shares: tuple[float, ...], held_out: float
) -> None:
    split = SplitConfig(sft=shares[0], rm=shares[1], ppo=shares[2], held_out=held_out, seed=seed)
    part = assign((Message("user", text),), split)
    assert dict(zip(STAGES, shares, strict=True))[part.stage] > 0
    assert part == assign((Message("user", text),), split)
    if held_out in (0.0, 1.0):
        assert part.held_out == bool(held_out)


def test_the_seed_changes_the_parts_and_roles_matter() -> None:
    first = [assign(prompt, SplitConfig(seed=0)) for prompt in PROMPTS]
    assert sum(a != assign(p, SplitConfig(seed=1)) for a, p in zip(first, PROMPTS, strict=True)) > 2000
    as_system = [assign((Message("system", prompt[0].content),), SplitConfig()) for prompt in PROMPTS]
    assert as_system != first


def test_changing_a_stage_share_leaves_the_held_out_choice() -> None:
    for prompt in PROMPTS[:500]:
        assert assign(prompt, SplitConfig(rm=0.4)).held_out == assign(prompt, SplitConfig(rm=4.0)).held_out


def test_without_weights_every_row_is_used() -> None:
    assert mix_sizes({"a": 10, "b": 3}, {"a": None, "b": None}) == {"a": 10, "b": 3}


def test_the_source_that_runs_out_first_bounds_the_epoch() -> None:
    assert mix_sizes({"a": 100, "b": 10}, {"a": 3.0, "b": 1.0}) == {"a": 30, "b": 10}
    assert mix_sizes({"a": 100, "b": 10}, {"a": 1.0, "b": 0.0}) == {"a": 100, "b": 0}
    assert mix_sizes({"a": 100, "b": 0}, {"a": 1.0, "b": 9.0}) == {"a": 100, "b": 0}
    assert mix_sizes({"a": 5, "b": 5}, {"a": 0.0, "b": 0.0}) == {"a": 0, "b": 0}


SIZES = st.dictionaries(st.sampled_from("abcd"), st.tuples(st.integers(1, 5000), st.floats(0.01, 10)), min_size=1)


@given(SIZES)
def test_the_mix_is_in_proportion_and_exhausts_one_source(sources: dict[str, tuple[int, float]]) -> None:
    available = {name: rows for name, (rows, _) in sources.items()}
    weights = {name: weight for name, (_, weight) in sources.items()}
    taken = mix_sizes(available, weights)
    assert all(0 <= taken[name] <= available[name] for name in available)
    assert any(taken[name] == available[name] for name in available)
    epoch = min(available[name] / weights[name] for name in available)
    assert all(abs(taken[name] - weights[name] * epoch) <= 1.0 for name in available)


def test_a_forgotten_weight_is_an_error() -> None:
    with pytest.raises(ConfigError, match="b has no weight while others have"):
        mix_sizes({"a": 1, "b": 1}, {"a": 1.0, "b": None})


def test_absent_and_reduced_sources_are_reported() -> None:
    reports = mix_reports("sft_train", {"a": 100, "b": 0, "c": 10}, {"a": 50, "b": 0, "c": 10})
    assert len(reports) == 2
    assert "50 of 100 rows of a" in reports[0] and "source b has no usable row" in reports[1]
    assert mix_reports("sft_train", {"a": 0, "b": 0}, {"a": 0, "b": 0}) == []
