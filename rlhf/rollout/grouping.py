"""Micro-batches of rows of similar length, so that little of them is padding."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor


def equal_groups(lengths: Int[Tensor, " B"], size: int) -> list[Int[Tensor, " n"]]:
    """Row numbers in order of length, in consecutive groups of `size`; the last one may be smaller."""
    return list(torch.split(lengths.argsort(stable=True).cpu(), size))


def micro_batches(rows: Int[Tensor, " B"], lengths: Int[Tensor, " L"], *, size: int) -> list[Int[Tensor, " n"]]:
    """The given rows in B / `size` groups of the least padding; `lengths` has the tokens of every row there is."""
    groups = least_padding(lengths[rows].tolist(), len(rows) // size)
    return [rows[torch.tensor(group)] for group in groups]


def least_padding(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Row numbers in exactly `count` groups, none empty, whose padding is the least possible.

    A group has as many places as its longest row has tokens, times its rows. The rows are sorted by length and cut
    where the places of all groups together are fewest (dynamic programming over the cuts), short rows in larger groups
    than long ones. No group has more places than one of equally many of the longest rows would. Raises ValueError if
    `count` does not divide the rows.
    """
    total = len(lengths)
    if count < 1 or total % count:
        raise ValueError(f"{total} rows cannot be {count} groups")
    order = np.argsort(np.asarray(lengths), kind="stable")
    widths = np.asarray(lengths)[order]
    most = total // count * int(widths[-1]) if total else 0
    cost = np.full(total + 1, np.inf)
    cost[0] = 0.0
    cuts = np.zeros((count + 1, total + 1), dtype=np.int64)
    for group in range(1, count + 1):
        following = np.full(total + 1, np.inf)
        for end in range(group, total - (count - group) + 1):
            starts = np.arange(group - 1, end)
            own = (end - starts) * widths[end - 1]
            places = np.where(own <= most, cost[starts] + own, np.inf)
            best = int(places.argmin())
            following[end], cuts[group, end] = places[best], starts[best]
        cost = following
    groups, end = [], total
    for group in range(count, 0, -1):
        start = int(cuts[group, end])
        groups.append([int(row) for row in order[start:end]])
        end = start
    return groups[::-1]
