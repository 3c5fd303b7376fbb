"""From the score of a response to the reward of each of its tokens."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.functional.kl import kl_k1
from rlhf.functional.masking import last_true_index


def token_rewards(
    scores: Float[Tensor, " B"],
    logprobs: Float[Tensor, "B R"],
    ref_logprobs: Float[Tensor, "B R"],
    response_mask: Bool[Tensor, "B R"],
    *,
    kl_coef: float,
) -> Float[Tensor, "B R"]:
    """`-kl_coef * (log pi - log pi_ref)` at every response token, plus the score at the last one (EOS, if it ended).

    Zero outside the mask; a row without any True gets no score. Ziegler et al. 2019, equation 2, spread over tokens as
    in Ouyang et al. 2022.
    """
    penalty = -kl_coef * kl_k1(logprobs, ref_logprobs)
    positions = torch.arange(response_mask.shape[1], device=response_mask.device)
    is_last = positions == last_true_index(response_mask).unsqueeze(1)
    return torch.where(response_mask, penalty + torch.where(is_last, scores.unsqueeze(1), 0.0), 0.0)


def adjust_scores(
    scores: Float[Tensor, " B"],
    ended: Bool[Tensor, " B"],
    *,
    mean: float,
    std: float,
    clip: float | None,
    missing_eos_penalty: float,
    scale: float = 1.0,
) -> Float[Tensor, " B"]:
    """Normalise, clip, scale, punish: `scale clamp((score - mean) / std, ±clip) - missing_eos_penalty [not ended]`.

    The penalty comes after clipping, so that no score can hide it. `clip=None` does not clip. Raises ValueError if
    `std` is not positive.
    """
    if std <= 0:
        raise ValueError(f"std={std}: the standard deviation of the reference scores must be positive")
    normalized = (scores - mean) / std
    clipped = scale * (normalized if clip is None else normalized.clamp(-clip, clip))
    return torch.where(ended, clipped, clipped - missing_eos_penalty)


def repeated_share(ids: Int[Tensor, "B R"], mask: Bool[Tensor, "B R"], *, ngram: int) -> Float[Tensor, " B"]:
    """The share of each response's n-grams that occurred before in it: 0 if none did or it has fewer than `ngram` ids.

    1 - distinct / all: "seq-rep-n" of Welleck et al. 2019 (1908.04319), section 6.1.
    """
    shares = []
    for row, kept in zip(ids.tolist(), mask.tolist(), strict=True):
        tokens = [token for token, real in zip(row, kept, strict=True) if real]
        grams = [tuple(tokens[start : start + ngram]) for start in range(len(tokens) - ngram + 1)]
        shares.append(1.0 - len(set(grams)) / len(grams) if grams else 0.0)
    return torch.tensor(shares, dtype=torch.float32, device=ids.device)
