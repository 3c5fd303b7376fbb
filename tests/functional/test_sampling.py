"""Drawing tokens: distribution, independence of streams, and the same cuts as transformers makes."""

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rlhf.functional import sampling
from rlhf.functional.sampling import draw, penalise_repetition, restrict, stream_keys, stream_uniforms


@pytest.fixture(params=["in order", "in parallel"])
def sums(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Running sums that are taken to be made one after the other, as they are on a CPU, or not, as on a GPU."""
    monkeypatch.setattr(sampling, "_adds_in_order", lambda device: request.param == "in order")


@pytest.mark.usefixtures("sums")
@pytest.mark.parametrize(("size", "count"), [(5, 200_000), (700, 200_000), (4500, 20_000)])
def test_draws_follow_the_distribution(size: int, count: int) -> None:
    logits = torch.randn(1, size, generator=torch.Generator().manual_seed(size))
    logits[0, 3] = -torch.inf
    uniforms = stream_uniforms(stream_keys(torch.arange(count), seed=1), 1)[:, 0]
    ids, logprobs = draw(logits.expand(count, size), uniforms)
    expected = logits.softmax(dim=1)[0] * count
    seen = torch.bincount(ids, minlength=size)
    possible = expected > 0
    assert int(seen[~possible].sum()) == 0
    chi_square = float(((seen - expected)[possible].square() / expected[possible]).sum())
    freedom = int(possible.sum()) - 1
    assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5  # Five standard deviations.
    torch.testing.assert_close(logprobs, logits.log_softmax(dim=1)[0][ids], atol=1e-5, rtol=0)


@pytest.mark.usefixtures("sums")
@pytest.mark.parametrize("size", [1000, 6000])
def test_the_ends_of_the_interval_draw_possible_tokens(size: int) -> None:
    logits = torch.full((2, size), -torch.inf)
    logits[:, 400:600] = torch.randn(2, 200, generator=torch.Generator().manual_seed(0))
    ids, logprobs = draw(logits, torch.tensor([0.0, 1.0 - 2.0**-24]))
    assert ids.tolist() == [400, 599]
    assert torch.isfinite(logprobs).all()


@pytest.mark.usefixtures("sums")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 300, 40_000])
def test_draws_invert_the_distribution_whatever_the_format_and_the_blocks(dtype: torch.dtype, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    logits = 3 * torch.randn(30, size, generator=generator)
    logits[:, 1:][torch.rand(30, size - 1, generator=generator) < 0.3] = -torch.inf
    logits, uniforms = logits.to(dtype), torch.rand(30, generator=generator)
    ids, logprobs = draw(logits, uniforms)
    exact = logits.double().softmax(dim=1)
    before, own = (exact.cumsum(dim=1) - exact).gather(1, ids.unsqueeze(1)), exact.gather(1, ids.unsqueeze(1))
    assert (own > 0).all()
    assert ((before - 1e-5 <= uniforms.unsqueeze(1)) & (uniforms.unsqueeze(1) <= before + own + 1e-5)).all()
    torch.testing.assert_close(logprobs, own.log().squeeze(1).float(), atol=2e-5, rtol=0)


def test_streams_are_uniform_and_do_not_resemble_each_other() -> None:
    numbers = stream_uniforms(stream_keys(torch.arange(400), seed=3), 500)
    assert float(numbers.min()) >= 0.0
    assert float(numbers.max()) < 1.0
    counts = torch.histc(numbers, bins=50, min=0.0, max=1.0)
    expected = numbers.numel() / 50
    assert float(((counts - expected).square() / expected).sum()) < 110  # 49 degrees of freedom.
    for series in (numbers, numbers.T):  # Streams among each other, and neighbouring numbers of one.
        correlation = torch.corrcoef(series[:20])
        assert float((correlation - torch.eye(20)).abs().max()) < 0.25


def test_a_stream_depends_on_its_seed_and_index_alone() -> None:
    together = stream_uniforms(stream_keys(torch.tensor([4, 9, 2**40]), seed=7), 6)
    alone = stream_uniforms(stream_keys(torch.tensor([9]), seed=7), 3)
    assert torch.equal(together[1:2, :3], alone)
    assert not torch.equal(stream_uniforms(stream_keys(torch.tensor([9]), seed=8), 3), alone)


def test_cuts_are_those_of_transformers() -> None:
    logits = 3 * torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    ids = torch.zeros(6, 1, dtype=torch.long)
    for own, theirs in (
        (restrict(logits, top_k=7), TopKLogitsWarper(7)(ids, logits)),
        (restrict(logits, top_p=0.8), TopPLogitsWarper(0.8)(ids, logits)),
        (restrict(logits, min_p=0.1), MinPLogitsWarper(0.1)(ids, logits)),
        (
            restrict(logits, top_k=20, top_p=0.9, min_p=0.05),
            MinPLogitsWarper(0.05)(ids, TopPLogitsWarper(0.9)(ids, TopKLogitsWarper(20)(ids, logits))),
        ),
    ):
        assert torch.equal(own, theirs)
        assert torch.isfinite(own).any(dim=1).all()


def test_repetition_is_penalised_as_transformers_does() -> None:
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 2, 2], [5, 5, 5], [0, 19, 7]])
    seen = torch.zeros(3, 20, dtype=torch.bool).scatter(1, ids, True)
    expected = RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone())
    torch.testing.assert_close(penalise_repetition(logits, seen, penalty=1.3), expected)
