"""The cache of keys and values: a block of memory for each layer, divided into slots of equal length."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from rlhf.models.decoder.weights import DecoderWeights


class Arena:
    """Keys and values of every layer, each [slots, kv_heads, length, head_dim], reused from rollout to rollout.

    Both of a layer lie in one block of memory, `layers`, so that a token's are written at once.
    """

    layers: list[Tensor]

    def __init__(self) -> None:
        self.release()

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
        heads = torch.arange(2 * slots * weights.kv_heads, device=weights.device).view(2, slots, weights.kv_heads)
        self._starts = (heads * length).transpose(0, 1).reshape(slots, -1)
        self._range = torch.arange(length, device=weights.device)

    def places(self, positions: Int[Tensor, " n"]) -> Int[Tensor, " N"]:
        """Where the keys and then the values of a token of each of the first slots are, in a layer seen as rows."""
        return (self._starts[: positions.shape[0]] + positions.unsqueeze(1)).flatten()

    def behind(self, positions: Int[Tensor, " n"], *, length: int) -> Bool[Tensor, "n L"]:
        """Which of the first places of a slot are behind the position of each of the first slots."""
        return self._range[:length] > positions.unsqueeze(1)

    def release(self) -> None:
        """Give the memory back."""
        self.layers = []
        self.slots = self.length = 0
        self._starts = torch.empty(0, 0)
        self._range = torch.empty(0)

    def move(self, source: int, target: int) -> None:
        """Copy one slot to another."""
        for kept in self.layers:
            kept[:, target] = kept[:, source]

    def tensors(self) -> tuple[Tensor, ...]:
        """All that decoding reads of it."""
        return (*self.layers, self._starts, self._range)

    @property
    def nbytes(self) -> int:
        """Its memory."""
        return sum(kept.nbytes for kept in self.layers)


def bytes_per_token(weights: DecoderWeights) -> int:
    """Memory of one token's keys and values."""
    shape = weights.shape
    each = shape.layers * weights.kv_heads * shape.head_dim
    return 2 * each * torch.finfo(weights.dtype).bits // 8
