"""Rows of token lists to padded tensors. Masks come from lengths: a token that equals the padding id still counts."""

import json
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from rlhf.batch import PreferenceBatch, PromptBatch, SFTBatch

Row = dict[str, Any]


def pad(
    sequences: Sequence[Sequence[int]], *, pad_id: int, left: bool = False, length: int | None = None
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Pad lists to the longest of them (or `length`): ids int64 [B, T] and a mask [B, T], True at real tokens."""
    width = length or max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(sequences), width), dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        columns = slice(width - len(sequence), width) if left else slice(0, len(sequence))
        ids[row, columns] = torch.tensor(sequence, dtype=torch.long)
        mask[row, columns] = True
    return ids, mask


def collate_prompts(rows: Sequence[Row], *, pad_id: int) -> PromptBatch:
    """Left-pad the prompts."""
    prompt_ids, prompt_mask = pad([row["prompt_ids"] for row in rows], pad_id=pad_id, left=True)
    records = tuple(
        {"messages": row["messages"], "source": row["source"], **json.loads(row.get("extra") or "{}")} for row in rows
    )
    return PromptBatch(prompt_ids=prompt_ids, prompt_mask=prompt_mask, records=records)


def collate_sft(rows: Sequence[Row], *, pad_id: int) -> SFTBatch:
    """Join prompt and chosen answer and right-pad.

    The targets are the answer's tokens, EOS included, unless `answer_is_target` is false, and those of earlier answers:
    `prompt_targets` has where each of these begins and ends in the prompt, one behind the other.
    """
    sequences = [[*row["prompt_ids"], *row["chosen_ids"]] for row in rows]
    sequence_ids, attention_mask = pad(sequences, pad_id=pad_id)
    prompt_lengths = torch.tensor([len(row["prompt_ids"]) for row in rows])
    is_target = torch.arange(sequence_ids.shape[1])[None, :] >= prompt_lengths[:, None]
    for index, row in enumerate(rows):
        is_target[index] &= row.get("answer_is_target", True)
        places = row.get("prompt_targets") or ()
        for start, end in zip(places[::2], places[1::2], strict=True):
            is_target[index, start:end] = True
    return SFTBatch(sequence_ids=sequence_ids, attention_mask=attention_mask, loss_mask=attention_mask & is_target)


def collate_pairs(rows: Sequence[Row], *, pad_id: int, tail: Sequence[int] = ()) -> PreferenceBatch:
    """Join the prompt with each of its two answers, and with a `tail` behind them; right-pad all to one length."""
    names = ("chosen", "rejected")
    sides = {side: [[*row["prompt_ids"], *row[f"{side}_ids"], *tail] for row in rows] for side in names}
    length = max(len(sequence) for sequences in sides.values() for sequence in sequences)
    chosen_ids, chosen_mask = pad(sides["chosen"], pad_id=pad_id, length=length)
    rejected_ids, rejected_mask = pad(sides["rejected"], pad_id=pad_id, length=length)
    prompt_lengths = torch.tensor([len(row["prompt_ids"]) for row in rows])
    is_response = torch.arange(length)[None, :] >= prompt_lengths[:, None]
    return PreferenceBatch(
        chosen_ids=chosen_ids,
        chosen_mask=chosen_mask,
        chosen_targets=chosen_mask & is_response,
        rejected_ids=rejected_ids,
        rejected_mask=rejected_mask,
        rejected_targets=rejected_mask & is_response,
    )
