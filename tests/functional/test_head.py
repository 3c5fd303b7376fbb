"""Log-probabilities straight from hidden states, against those of whole logits."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf.functional.head import head_logprobs
from rlhf.functional.logprobs import entropy, token_logprobs


def _layer(
    tokens: int, width: int, vocabulary: int, *, seed: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((tokens, width), (vocabulary, width), (vocabulary,))
    )
    return hidden, weight, bias, torch.randint(vocabulary, (tokens,), generator=generator)


@given(
    shape=st.tuples(st.integers(0, 5), st.integers(1, 4), st.integers(1, 9)),
    seed=st.integers(0, 999),
    temperature=st.floats(0.3, 3.0),
    chunk_columns=st.integers(1, 10),
    padding=st.integers(0, 4),
    has_bias=st.booleans(),
)
def test_values_and_gradients_are_those_of_whole_logits(
    shape: tuple[int, int, int], seed: int, temperature: float, chunk_columns: int, padding: int, has_bias: bool
) -> None:
    hidden, weight, bias, ids = _layer(*shape, seed=seed)
    limit = max(1, shape[2] - padding)
    ids = ids.clamp(max=limit - 1)
    own_bias = bias if has_bias else None
    ours = head_logprobs(
        hidden, weight, own_bias, ids, limit=limit, temperature=temperature, chunk_columns=chunk_columns
    )
    logits = F.linear(hidden, weight, own_bias)[:, :limit]
    expected = token_logprobs(logits, ids, temperature=temperature)
    torch.testing.assert_close(ours[:, 0], expected)
    torch.testing.assert_close(ours[:, 1], entropy(logits, temperature=temperature))
    incoming = torch.linspace(-1, 1, shape[0], dtype=torch.float64)
    inputs = (hidden, weight, bias) if has_bias else (hidden, weight)
    for mine, plain in zip(
        torch.autograd.grad((ours[:, 0] * incoming).sum(), inputs),
        torch.autograd.grad((expected * incoming).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, plain)


def test_gradient_numerically() -> None:
    hidden, weight, bias, ids = _layer(4, 3, 7, seed=1)
    compute = lambda h, w, b: head_logprobs(h, w, b, ids, limit=6, temperature=0.7, chunk_columns=4)[:, 0]  # noqa: E731
    assert torch.autograd.gradcheck(compute, (hidden, weight, bias))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_in_each_format(dtype: torch.dtype, tolerance: float) -> None:
    """The weight's gradient is bit for bit that of the whole logits."""
    hidden, weight, bias, ids = _layer(24, 16, 70, seed=2, dtype=dtype)
    ours = head_logprobs(hidden, weight, bias, ids, chunk_columns=16)
    assert ours.dtype == torch.float32
    expected = token_logprobs(F.linear(hidden, weight, bias), ids)
    torch.testing.assert_close(ours[:, 0], expected, rtol=1e-5, atol=1e-5)
    mine = torch.autograd.grad(ours[:, 0].sum(), (hidden, weight, bias))
    plain = torch.autograd.grad(expected.sum(), (hidden, weight, bias))
    for one, other in zip(mine, plain, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


def test_a_frozen_weight_gets_no_gradient() -> None:
    hidden, weight, _, ids = _layer(3, 4, 5, seed=3)
    frozen = weight.detach()
    head_logprobs(hidden, frozen, None, ids)[:, 0].sum().backward()
    assert hidden.grad is not None
    assert frozen.grad is None


def test_far_apart_slices_neither_overflow_nor_vanish() -> None:
    hidden, ids = torch.ones(1, 1), torch.tensor([3])
    weight = torch.tensor([[-1e4], [0.0], [9e3], [1e4]])
    logprob, spread = head_logprobs(hidden, weight, None, ids, chunk_columns=1)[0].tolist()
    assert logprob == 0.0
    assert spread == pytest.approx(0.0, abs=1e-3)


def test_the_logits_are_never_whole() -> None:
    hidden, weight, _, ids = _layer(512, 8, 5000, seed=4, dtype=torch.bfloat16)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.shape[:1] == (512,):
                largest = max(largest, out.numel())
            return out

    with Watch():
        head_logprobs(hidden, weight, None, ids, chunk_columns=100)[:, 0].sum().backward()
    assert largest == 512 * 100
