"""Log-probabilities and entropies against a loop and against torch's own log-softmax."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from loops import log_softmax
from torch import Tensor

from rlhf.functional.logprobs import entropy, token_logprobs


def _inputs(
    batch: int, length: int, vocabulary: int, *, seed: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(batch, length, vocabulary, generator=generator, dtype=torch.float64)
    return logits.to(dtype), torch.randint(vocabulary, (batch, length), generator=generator)


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 7)),
    seed=st.integers(0, 999),
    temperature=st.floats(0.3, 3.0),
    chunk_size=st.integers(1, 20),
)
def test_against_the_equation(shape: tuple[int, int, int], seed: int, temperature: float, chunk_size: int) -> None:
    logits, ids = _inputs(*shape, seed=seed)
    result = token_logprobs(logits, ids, temperature=temperature, chunk_size=chunk_size)
    spread = entropy(logits, temperature=temperature, chunk_size=chunk_size)
    for b in range(shape[0]):
        for t in range(shape[1]):
            expected = log_softmax(logits[b, t].tolist(), temperature)
            assert result[b, t].item() == pytest.approx(expected[int(ids[b, t])], abs=1e-10)
            assert spread[b, t].item() == pytest.approx(-sum(math.exp(x) * x for x in expected), abs=1e-10)


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_gradient_numerically(chunk_size: int) -> None:
    logits, ids = _inputs(2, 3, 5, seed=1)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, ids, temperature=0.7, chunk_size=chunk_size), (logits,))


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 1e-3)],
)
def test_against_log_softmax_in_each_format(dtype: torch.dtype, tolerance: float) -> None:
    logits, ids = _inputs(3, 4, 50, seed=2, dtype=dtype)
    ours, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    weights = torch.linspace(-1, 1, 12).view(3, 4)
    wide = plain if dtype == torch.float64 else plain.float()
    expected = F.log_softmax(wide / 0.8, dim=-1).gather(2, ids.unsqueeze(2)).squeeze(2)
    result = token_logprobs(ours, ids, temperature=0.8, chunk_size=5)
    assert result.dtype == expected.dtype
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
    (result * weights).sum().backward()
    (expected * weights).sum().backward()
    assert ours.grad is not None
    assert plain.grad is not None
    assert ours.grad.dtype == dtype
    torch.testing.assert_close(ours.grad, plain.grad, rtol=tolerance, atol=tolerance)


def test_impossible_tokens_have_no_influence() -> None:
    logits, ids = _inputs(1, 3, 6, seed=3)
    ids = ids.clamp(max=3)
    limited = logits.clone()
    limited[..., 4:] = -math.inf
    limited.requires_grad_()
    result = token_logprobs(limited, ids)
    torch.testing.assert_close(result, token_logprobs(logits[..., :4], ids))
    torch.testing.assert_close(entropy(limited), entropy(logits[..., :4]))
    result.sum().backward()
    assert limited.grad is not None
    assert torch.all(limited.grad[..., 4:] == 0)
    assert torch.all(limited.grad[..., :4].isfinite())


def test_certain_and_uniform_distributions() -> None:
    certain = torch.tensor([[[1000.0, 0.0, 0.0, 0.0]]])
    uniform = torch.zeros(1, 1, 4)
    ids = torch.zeros(1, 1, dtype=torch.long)
    assert token_logprobs(certain, ids).item() == 0.0
    assert entropy(certain).item() == 0.0
    assert token_logprobs(uniform, ids).item() == pytest.approx(-math.log(4))
    assert entropy(uniform).item() == pytest.approx(math.log(4))


def test_the_entropy_has_no_gradient() -> None:
    assert not entropy(torch.zeros(1, 2, 3, requires_grad=True)).requires_grad


def test_a_slice_of_larger_logits_is_accepted() -> None:
    logits, ids = _inputs(2, 4, 9, seed=4)
    logits.requires_grad_()
    cut = token_logprobs(logits[:, :-1, :7], ids[:, :-1].clamp(max=6))
    torch.testing.assert_close(cut, token_logprobs(logits[:, :-1, :7].clone(), ids[:, :-1].clamp(max=6)))
    cut.sum().backward()
    assert logits.grad is not None
    assert torch.all(logits.grad[:, -1] == 0)
    assert torch.all(logits.grad[:, :, 7:] == 0)


def test_no_float32_copy_of_all_logits_is_made() -> None:
    logits = torch.zeros(4, 64, 256, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.zeros(4, 64, dtype=torch.long)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dtype == torch.float32:
                largest = max(largest, out.numel())
            return out

    with Watch():
        token_logprobs(logits, ids, chunk_size=8).sum().backward()
        entropy(logits.detach(), chunk_size=8)
    assert largest == 8 * 256
