"""The tensors that flow through a stage. A mask is True where a position counts.

B sequences, P prompt positions (left-padded), R response positions (right-padded), T = P + R.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorBatch:
    """Rows that can be sliced, indexed and moved together.

    Every tensor field has the rows as its first dimension; a tuple field has one entry per row, or none at all.
    """

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    def rows(self, index: slice | Tensor) -> Self:
        """The given rows of every field."""
        return type(self)(**{entry.name: _rows_of(getattr(self, entry.name), index) for entry in fields(self)})

    def to(self, device: torch.device | str) -> Self:
        """The same batch on another device."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return type(self)(
            **{name: value.to(device) if isinstance(value, Tensor) else value for name, value in values.items()}
        )

    def repeat(self, count: int) -> Self:
        """Each row `count` times, one behind the other."""
        if count == 1:
            return self
        index = torch.arange(len(self)).repeat_interleave(count)
        return self.rows(index)

    def split(self, size: int) -> list[Self]:
        """Consecutive parts of `size` rows; the last one may be smaller."""
        return [self.rows(slice(start, start + size)) for start in range(0, len(self), size)]


def _rows_of(values: Any, index: slice | Tensor) -> Any:
    if values is None:
        return None
    if isinstance(values, Tensor) or isinstance(index, slice):
        return values[index]
    positions = index.nonzero().flatten() if index.dtype == torch.bool else index
    return tuple(values[position] for position in positions.tolist()) if values else ()


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptBatch(TensorBatch):
    """Prompts, left-padded to a common length.

    `records` says what each prompt is beside its ids: "messages" (its turns, {"role", "content"}), "source", and the
    columns that the source keeps. It is needed where a prompt's text is, as by a reward model with another tokenizer,
    and may otherwise be left empty.
    """

    prompt_ids: Int[Tensor, "B P"]
    prompt_mask: Bool[Tensor, "B P"]
    records: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class SFTBatch(TensorBatch):
    """Whole sequences, right-padded. `loss_mask[b, t]` says that token t is a target (it is predicted from t-1)."""

    sequence_ids: Int[Tensor, "B T"]
    attention_mask: Bool[Tensor, "B T"]
    loss_mask: Bool[Tensor, "B T"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBatch(TensorBatch):
    """Examples one behind the other in fewer rows. `segment_ids` numbers the examples of a row from 1; 0 is padding.

    `position_ids` begin at 0 in every example.
    """

    sequence_ids: Int[Tensor, "B T"]
    segment_ids: Int[Tensor, "B T"]
    position_ids: Int[Tensor, "B T"]
    loss_mask: Bool[Tensor, "B T"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferenceBatch(TensorBatch):
    """Pairs of whole sequences with a common prompt, each side right-padded to the same length.

    The targets are the answers' tokens, EOS included.
    """

    chosen_ids: Int[Tensor, "B T"]
    chosen_mask: Bool[Tensor, "B T"]
    chosen_targets: Bool[Tensor, "B T"]
    rejected_ids: Int[Tensor, "B T"]
    rejected_mask: Bool[Tensor, "B T"]
    rejected_targets: Bool[Tensor, "B T"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout(TensorBatch):
    """Sampled responses behind their prompts. `response_mask` is True through EOS, EOS included.

    Where the generating backend says so: `ended` is whether a response came to its end, by EOS or by what else ends
    one; `sampled_logprobs` are the log-probabilities with which its tokens were drawn, under the sampling temperature,
    of the whole distribution.
    """

    sequence_ids: Int[Tensor, "B T"]
    prompt_mask: Bool[Tensor, "B P"]
    response_mask: Bool[Tensor, "B R"]
    ended: Bool[Tensor, " B"] | None = None
    sampled_logprobs: Float[Tensor, "B R"] | None = None

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
    """A rollout with everything that the update needs.

    `update_order` numbers the rows as the first pass of the update takes them: log-probabilities and values were
    computed in that pass's micro-batches, so that it begins with a probability ratio of exactly 1.
    """

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
    update_order: Int[Tensor, " B"]

    @property
    def rollout(self) -> Rollout:
        """The sampled tokens alone."""
        return Rollout(sequence_ids=self.sequence_ids, prompt_mask=self.prompt_mask, response_mask=self.response_mask)
