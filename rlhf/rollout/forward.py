"""Forward passes over sampled sequences. Training, scoring and evaluation call the same functions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.batch import PackedBatch, Rollout, SFTBatch
from rlhf.functional.losses import sft_loss
from rlhf.functional.masking import block_causal_bias, last_true_index, left_aligned, position_ids
from rlhf.models.head import Places, logprobs_at


def compact_inputs(sequence_ids: Int[Tensor, "B T"], attention_mask: Bool[Tensor, "B T"]) -> dict[str, Tensor]:
    """What a model takes of sequences: their tokens without the padding that they share."""
    ids, mask = left_aligned(sequence_ids, attention_mask)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids(mask)}


def response_places(rollout: Rollout) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"]]:
    """Row and column, in the compact sequences, of the states before each of the N response tokens."""
    rows, steps = rollout.response_mask.nonzero(as_tuple=True)
    return rows, rollout.prompt_mask.sum(dim=1)[rows] + steps - 1


def response_logprobs_and_entropy(
    engine: Any, rollout: Rollout, *, temperature: float, vocab_limit: int
) -> tuple[Float[Tensor, "B R"], Float[Tensor, "B R"]]:
    """Log-probability of each response token under the sampling temperature, and each distribution's entropy, in nats.

    Both are fp32 and 0 outside the response mask; entropies have no gradient. Logits beyond the tokenizer's vocabulary
    are padding of the embedding and have no probability.
    """
    rows, columns = response_places(rollout)
    logprobs, entropy = logprobs_at(
        engine,
        compact_inputs(rollout.sequence_ids, rollout.attention_mask),
        Places(rows=rows, columns=columns, ids=rollout.response_ids[rollout.response_mask]),
        temperature=temperature,
        vocab_limit=vocab_limit,
    )
    return spread(logprobs, rollout.response_mask), spread(entropy, rollout.response_mask)


def response_logprobs(engine: Any, rollout: Rollout, *, temperature: float, vocab_limit: int) -> Float[Tensor, "B R"]:
    """The first part of `response_logprobs_and_entropy`."""
    return response_logprobs_and_entropy(engine, rollout, temperature=temperature, vocab_limit=vocab_limit)[0]


def response_values(engine: Any, rollout: Rollout) -> Float[Tensor, "B R"]:
    """The critic's value of the state before each response token, fp32; 0 outside the response mask."""
    values: Tensor = engine(**compact_inputs(rollout.sequence_ids, rollout.attention_mask))
    return spread(values[response_places(rollout)], rollout.response_mask)


def spread(values: Float[Tensor, " N"], mask: Bool[Tensor, "B R"]) -> Float[Tensor, "B R"]:
    """The values, in order, where the mask is True; 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def sequence_scores(engine: Any, sequence_ids: Tensor, attention_mask: Tensor) -> Float[Tensor, " B"]:
    """The reward model's scalar at each sequence's last real token, fp32, whichever side is padded."""
    inputs = compact_inputs(sequence_ids, attention_mask)
    scalars: Tensor = engine(**inputs)
    return scalars.gather(1, last_true_index(inputs["attention_mask"]).unsqueeze(1)).squeeze(1)


def next_token_loss(engine: Any, batch: SFTBatch | PackedBatch, *, vocab_limit: int) -> Float[Tensor, ""]:
    """Summed next-token loss over the target tokens of a micro-batch, in nats."""
    inputs: Mapping[str, Tensor]
    if isinstance(batch, PackedBatch):
        bias: Tensor = block_causal_bias(batch.segment_ids, dtype=getattr(engine, "module", engine).dtype)
        inputs = {"input_ids": batch.sequence_ids, "attention_mask": bias, "position_ids": batch.position_ids}
    else:
        mask = batch.attention_mask
        inputs = {"input_ids": batch.sequence_ids, "attention_mask": mask, "position_ids": position_ids(mask)}
    targets = batch.loss_mask[:, 1:]
    rows, columns = targets.nonzero(as_tuple=True)
    places = Places(rows=rows, columns=columns, ids=batch.sequence_ids[:, 1:][targets])
    logprobs, _ = logprobs_at(engine, inputs, places, vocab_limit=vocab_limit)
    return sft_loss(spread(logprobs, targets), targets)


def target_logprobs(
    engine: Any,
    sequence_ids: Int[Tensor, "B T"],
    attention_mask: Bool[Tensor, "B T"],
    targets: Bool[Tensor, "B T"],
    *,
    vocab_limit: int,
) -> Float[Tensor, "B T-1"]:
    """Log-probability of tokens 1 to T-1 of whole sequences, fp32; 0 where a token is no target."""
    following = targets[:, 1:]
    rows, columns = following.nonzero(as_tuple=True)
    logprobs, _ = logprobs_at(
        engine,
        {"input_ids": sequence_ids, "attention_mask": attention_mask, "position_ids": position_ids(attention_mask)},
        Places(rows=rows, columns=columns, ids=sequence_ids[:, 1:][following]),
        vocab_limit=vocab_limit,
    )
    return spread(logprobs, following)


@torch.no_grad()
def in_groups(
    compute: Callable[[Rollout], Tensor], rollout: Rollout, groups: Sequence[Int[Tensor, " n"]]
) -> Float[Tensor, "B ..."]:
    """What `compute` returns for each row, without gradient, computed for one group of rows after the other.

    Every row is in one group. Numbers depend a little on the shapes that they are computed in, so a training pass over
    the same groups gives the same ones.
    """
    order = torch.cat(list(groups)).to(rollout.sequence_ids.device)
    computed = torch.cat([compute(rollout.rows(group)) for group in groups])
    return torch.empty_like(computed).index_copy_(0, order, computed)
