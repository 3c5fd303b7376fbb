"""The tensors that flow through a stage. A mask is True where a position counts.

B sequences, P prompt positions (left-padded), R response positions (right-padded), T = P + R.
"""

from dataclasses import dataclass, fields
from typing import Self, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorBatch:
    """Rows that can be sliced, indexed and moved together: every tensor field has the rows as its first dimension."""

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    def rows(self, index: slice | Tensor) -> Self:
        """The given rows of every field."""
        return type(self)(**{entry.name: getattr(self, entry.name)[index] for entry in fields(self)})

    def to(self, device: torch.device | str) -> Self:
        """The same batch on another device."""
        return type(self)(**{entry.name: getattr(self, entry.name).to(device) for entry in fields(self)})

    def split(self, size: int) -> list[Self]:
        """Consecutive parts of `size` rows; the last one may be smaller."""
        return [self.rows(slice(start, start + size)) for start in range(0, len(self), size)]


BatchType = TypeVar("BatchType", bound=TensorBatch)


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptBatch(TensorBatch):
    """Prompts, left-padded to a common length."""

    prompt_ids: Int[Tensor, "B P"]
    prompt_mask: Bool[Tensor, "B P"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SFTBatch(TensorBatch):
    """Whole sequences, right-padded. `loss_mask[b, t]` says that token t is a target (it is predicted from t-1)."""

    sequence_ids: Int[Tensor, "B T"]
    attention_mask: Bool[Tensor, "B T"]
    loss_mask: Bool[Tensor, "B T"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferenceBatch(TensorBatch):
    """Pairs of whole sequences with a common prompt, each side right-padded to the same length."""

    chosen_ids: Int[Tensor, "B T"]
    chosen_mask: Bool[Tensor, "B T"]
    rejected_ids: Int[Tensor, "B T"]
    rejected_mask: Bool[Tensor, "B T"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout(TensorBatch):
    """Sampled responses behind their prompts. `response_mask` is True through EOS, EOS included."""

    sequence_ids: Int[Tensor, "B T"]
    prompt_mask: Bool[Tensor, "B P"]
    response_mask: Bool[Tensor, "B R"]

    @property
    def attention_mask(self) -> Bool[Tensor, "B T"]:
        """True at every real token."""
        return torch.cat([self.prompt_mask, self.response_mask], dim=1)

    @property
    def response_ids(self) -> Int[Tensor, "B R"]:
        """The response part of the sequences."""
        return self.sequence_ids[:, self.prompt_mask.shape[1] :]


@dataclass(frozen=True, kw_only=True, slots=True)
class Experience(TensorBatch):
    """A rollout with everything that the update needs."""

    sequence_ids: Int[Tensor, "B T"]
    prompt_mask: Bool[Tensor, "B P"]
    response_mask: Bool[Tensor, "B R"]
    scores: Float[Tensor, " B"]
    old_logprobs: Float[Tensor, "B R"]
    ref_logprobs: Float[Tensor, "B R"]
    old_values: Float[Tensor, "B R"]
    rewards: Float[Tensor, "B R"]
    advantages: Float[Tensor, "B R"]
    returns: Float[Tensor, "B R"]

    @property
    def rollout(self) -> Rollout:
        """The sampled tokens alone."""
        return Rollout(sequence_ids=self.sequence_ids, prompt_mask=self.prompt_mask, response_mask=self.response_mask)


def concatenate(batches: list[BatchType]) -> BatchType:
    """Stack the rows of batches whose other dimensions are equal."""
    first = batches[0]
    return type(first)(
        **{entry.name: torch.cat([getattr(batch, entry.name) for batch in batches]) for entry in fields(first)}
    )
