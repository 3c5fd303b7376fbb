"""Advantage estimation: with a critic, against the other answers to the same prompt, or from the reward alone.

Groups are `group_size` consecutive rows, the answers to one prompt. Every result is 0 outside the mask.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def gae(
    rewards: Float[Tensor, "B R"],
    values: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    *,
    gamma: float,
    gae_lambda: float,
) -> tuple[Float[Tensor, "B R"], Float[Tensor, "B R"]]:
    """Generalised advantage estimates and the returns that the critic learns.

    `delta_t = r_t + gamma V_{t+1} - V_t`, `A_t = delta_t + gamma lambda A_{t+1}`, `return_t = A_t + V_t`
    (Schulman et al. 2016, equation 16). A response is a whole episode: V and A are 0 after its last token, so there is
    no bootstrap from padding. The True positions of a row must be contiguous. Advantages are not whitened; both results
    are 0 outside the mask.
    """
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(mask[:, t], delta + gamma * gae_lambda * next_advantage, 0.0)
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


def group_normalized(
    rewards: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"], *, group_size: int, eps: float = 1e-6
) -> Float[Tensor, "B R"]:
    """GRPO's advantages: each token has its answer's `(R - mean_group(R)) / (std_group(R) + eps)`, R = sum of rewards.

    Shao et al. 2024 (DeepSeekMath, 2402.03300), section 4.1.2; the standard deviation divides by group_size - 1.
    A group with equal rewards has advantage 0. Raises ValueError if the rows are not whole groups of at least two.
    """
    totals = _group_totals(rewards, mask, group_size=group_size)
    normalized = (totals - totals.mean(dim=1, keepdim=True)) / (totals.std(dim=1, keepdim=True) + eps)
    # Rounding of the mean alone would otherwise be divided by itself.
    differ = totals.amax(dim=1, keepdim=True) > totals.amin(dim=1, keepdim=True)
    normalized = torch.where(differ, normalized, 0.0)
    return torch.where(mask, normalized.reshape(-1, 1), 0.0)


def leave_one_out(rewards: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"], *, group_size: int) -> Float[Tensor, "B R"]:
    """RLOO's advantages: each token has `R_i - mean_{j != i} R_j`, R = sum of an answer's rewards, j in its group.

    Ahmadian et al. 2024 (2402.14740), equation 7. Raises ValueError if the rows are not whole groups of at least two.
    """
    totals = _group_totals(rewards, mask, group_size=group_size)
    advantages = (totals - totals.mean(dim=1, keepdim=True)) * (group_size / (group_size - 1))
    return torch.where(mask, advantages.reshape(-1, 1), 0.0)


def rewards_to_go(rewards: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"], *, gamma: float) -> Float[Tensor, "B R"]:
    """REINFORCE's return of each token: `G_t = r_t + gamma G_{t+1}` within the response.

    With the KL penalty in r and whitened over all ranks it is REINFORCE++ (Hu et al. 2025, 2501.03262, section 3).
    """
    returns = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        following = torch.where(mask[:, t], rewards[:, t] + gamma * following, 0.0)
        returns[:, t] = following
    return returns


def _group_totals(rewards: Tensor, mask: Tensor, *, group_size: int) -> Tensor:
    if group_size < 2 or len(rewards) % group_size:
        raise ValueError(f"group_size={group_size}: {len(rewards)} responses are not whole groups of at least two")
    return torch.where(mask, rewards, 0.0).sum(dim=1).view(-1, group_size)


def importance_weights(
    trained: Float[Tensor, "B R"], sampled: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"], *, cap: float
) -> Float[Tensor, "B R"]:
    """min(cap, p / q) of each token, p its probability in training and q that in generation; 0 outside the mask.

    Truncated importance sampling (Ionides 2008): it corrects, with bounded variance, for tokens that were drawn from
    another distribution than the one that is trained.

    Args:
        trained, sampled: log-probabilities in nats.
        cap: largest weight, at least 1.
    """
    ratios = torch.exp(torch.where(mask, trained - sampled, 0.0)).clamp(max=cap)
    return torch.where(mask, ratios, 0.0)
