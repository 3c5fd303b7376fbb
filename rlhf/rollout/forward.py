"""Forward passes over sampled sequences. Training, scoring and evaluation call the same functions."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.batch import PackedBatch, Rollout, SFTBatch
from rlhf.functional.logprobs import entropy, token_logprobs
from rlhf.functional.losses import sft_loss
from rlhf.functional.masking import block_causal_bias, last_true_index, position_ids


def response_logits(engine: Any, rollout: Rollout, *, vocab_limit: int) -> Float[Tensor, "B R V"]:
    """The logits from which each response token was drawn, in the engine's format.

    Token P+i is predicted at position P+i-1; the model computes only those R positions' logits. Entries beyond the
    tokenizer's vocabulary are cut off: they are padding of the embedding.
    """
    response_length = rollout.response_mask.shape[1]
    mask = rollout.attention_mask
    logits: Tensor = engine(
        input_ids=rollout.sequence_ids,
        attention_mask=mask,
        position_ids=position_ids(mask),
        use_cache=False,
        logits_to_keep=response_length + 1,
    ).logits
    return logits[:, :-1, :vocab_limit]


def response_logprobs(engine: Any, rollout: Rollout, *, temperature: float, vocab_limit: int) -> Float[Tensor, "B R"]:
    """Log-probability of each response token under the sampling temperature, fp32; 0 outside the response mask."""
    logits = response_logits(engine, rollout, vocab_limit=vocab_limit)
    logprobs = token_logprobs(logits, rollout.response_ids.clamp(max=vocab_limit - 1), temperature=temperature)
    return torch.where(rollout.response_mask, logprobs, 0.0)


def response_logprobs_and_entropy(
    engine: Any, rollout: Rollout, *, temperature: float, vocab_limit: int
) -> tuple[Float[Tensor, "B R"], Float[Tensor, "B R"]]:
    """`response_logprobs` and, without gradient, the entropy of each token's distribution in nats."""
    logits = response_logits(engine, rollout, vocab_limit=vocab_limit)
    logprobs = token_logprobs(logits, rollout.response_ids.clamp(max=vocab_limit - 1), temperature=temperature)
    spread = entropy(logits.detach(), temperature=temperature)
    mask = rollout.response_mask
    return torch.where(mask, logprobs, 0.0), torch.where(mask, spread, 0.0)


def response_values(engine: Any, rollout: Rollout) -> Float[Tensor, "B R"]:
    """The critic's value of the state before each response token, fp32; 0 outside the response mask."""
    mask = rollout.attention_mask
    values: Tensor = engine(input_ids=rollout.sequence_ids, attention_mask=mask, position_ids=position_ids(mask))
    prompt_length = rollout.prompt_mask.shape[1]
    return torch.where(rollout.response_mask, values[:, prompt_length - 1 : -1], 0.0)


def sequence_scores(engine: Any, sequence_ids: Tensor, attention_mask: Tensor) -> Float[Tensor, " B"]:
    """The reward model's scalar at each sequence's last real token, fp32, whichever side is padded."""
    scalars: Tensor = engine(
        input_ids=sequence_ids, attention_mask=attention_mask, position_ids=position_ids(attention_mask)
    )
    return scalars.gather(1, last_true_index(attention_mask).unsqueeze(1)).squeeze(1)


def next_token_loss(engine: Any, batch: SFTBatch | PackedBatch, *, vocab_limit: int) -> Float[Tensor, ""]:
    """Summed next-token loss over the target tokens of a micro-batch, in nats."""
    if isinstance(batch, PackedBatch):
        mask: Tensor = block_causal_bias(batch.segment_ids, dtype=engine.module.dtype)
        positions = batch.position_ids
    else:
        mask, positions = batch.attention_mask, position_ids(batch.attention_mask)
    logits = engine(input_ids=batch.sequence_ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    logprobs = token_logprobs(logits[:, :-1, :vocab_limit], batch.sequence_ids[:, 1:])
    return sft_loss(logprobs, batch.loss_mask[:, 1:])


def target_logprobs(
    engine: Any,
    sequence_ids: Int[Tensor, "B T"],
    attention_mask: Bool[Tensor, "B T"],
    targets: Bool[Tensor, "B T"],
    *,
    vocab_limit: int,
) -> Float[Tensor, "B T-1"]:
    """Log-probability of tokens 1 to T-1 of whole sequences, fp32; 0 where a token is no target."""
    logits = engine(
        input_ids=sequence_ids,
        attention_mask=attention_mask,
        position_ids=position_ids(attention_mask),
        use_cache=False,
    ).logits
    following = sequence_ids[:, 1:].clamp(max=vocab_limit - 1)
    return torch.where(targets[:, 1:], token_logprobs(logits[:, :-1, :vocab_limit], following), 0.0)


@torch.no_grad()
def in_micro_batches(compute: Callable[[Rollout], Tensor], rollout: Rollout, *, micro_batch_size: int) -> Tensor:
    """Concatenate what `compute` returns for consecutive micro-batches, without gradient.

    The shapes are those of the training passes, so that both compute the same numbers.
    """
    return torch.cat([compute(part) for part in rollout.split(micro_batch_size)])
