"""Examples of a micro-batch packed into fewer rows, so that short ones do not pad up to the longest."""

import torch

from rlhf.batch import PackedBatch, SFTBatch


def assign_rows(lengths: list[int], *, width: int) -> list[list[int]]:
    """First-fit decreasing: which examples share a row of `width` tokens, longest first; no example exceeds `width`."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = next((row for row, free in enumerate(room) if free >= lengths[index]), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(width)
        rows[place].append(index)
        room[place] -= lengths[index]
    return rows


def pack(batch: SFTBatch, *, pad_id: int) -> PackedBatch:
    """The same tokens and targets in as few rows of the longest example's length as first-fit needs."""
    lengths = batch.attention_mask.sum(dim=1).tolist()
    rows = assign_rows(lengths, width=max(lengths))
    shape = (len(rows), max(lengths))
    sequence_ids = torch.full(shape, pad_id, dtype=torch.long)
    segment_ids, position_ids = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    loss_mask = torch.zeros(shape, dtype=torch.bool)
    for row, examples in enumerate(rows):
        start = 0
        for segment, index in enumerate(examples, start=1):
            columns = slice(start, start + lengths[index])
            real = batch.attention_mask[index]
            sequence_ids[row, columns] = batch.sequence_ids[index][real]
            segment_ids[row, columns] = segment
            position_ids[row, columns] = torch.arange(lengths[index])
            loss_mask[row, columns] = batch.loss_mask[index][real]
            # An example's first token is not predicted from the example before it.
            loss_mask[row, start] = False
            start += lengths[index]
    return PackedBatch(
        sequence_ids=sequence_ids, segment_ids=segment_ids, position_ids=position_ids, loss_mask=loss_mask
    )
