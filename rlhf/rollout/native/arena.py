"""The cache of keys and values: a block of memory for each layer, divided into slots of equal length."""

import torch
from torch import Tensor

from rlhf.models.decoder.weights import DecoderWeights


class Arena:
    """Keys and values of every layer, each [slots, kv_heads, length, head_dim], reused from rollout to rollout.

    Both of a layer lie in one block of memory, `layers`, so that a token's are written at once.
    """

    def __init__(self) -> None:
        self.layers: list[Tensor] = []
        self.slots = self.length = 0

    def fit(self, weights: DecoderWeights, *, slots: int, length: int) -> None:
        """Make room for so many slots of so many tokens; what is there is kept if it is large enough."""
        dtype = weights.dtype
        shape = (2, slots, weights.kv_heads, length, weights.shape.head_dim)
        old = self.layers[0] if self.layers else None
        if (
            old is not None
            and len(self.layers) == weights.shape.layers
            and (old.dtype, old.device) == (dtype, weights.device)
            and (old.shape[2], old.shape[4]) == (shape[2], shape[4])
            and old.shape[1] >= slots
            and old.shape[3] >= length
        ):
            return
        self.release()
        old = None
        self.layers = [torch.zeros(shape, dtype=dtype, device=weights.device) for _ in range(weights.shape.layers)]
        self.slots, self.length = slots, length

    def release(self) -> None:
        """Give the memory back."""
        self.layers = []
        self.slots = self.length = 0

    def move(self, source: int, target: int, *, length: int) -> None:
        """Copy the first tokens of one slot to another, and leave nothing of what was there."""
        for kept in self.layers:
            kept[:, target, :, :length] = kept[:, source, :, :length]
            kept[:, target, :, length:] = 0

    @property
    def nbytes(self) -> int:
        """Its memory."""
        return sum(kept.nbytes for kept in self.layers)


def bytes_per_token(weights: DecoderWeights) -> int:
    """Memory of one token's keys and values."""
    shape = weights.shape
    each = shape.layers * weights.kv_heads * shape.head_dim
    return 2 * each * torch.finfo(weights.dtype).bits // 8
