"""What is known of the sequences that are decoded together."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.models.decoder.weights import DecoderWeights
from rlhf.rollout.sampling import Sampling


@dataclass(slots=True)
class Slots:
    """The sequences in the batch, on the device. The first `count` slots are taken; the others hold what was left.

    M is one more than the longest response has tokens: a place for what is drawn after the last one.
    """

    tokens: Int[Tensor, " S"]
    positions: Int[Tensor, " S"]
    steps: Int[Tensor, " S"]
    done: Bool[Tensor, " S"]
    uniforms: Float[Tensor, "S M"]
    ids: Int[Tensor, "S M"]
    logprobs: Float[Tensor, "S M"]
    seen: Bool[Tensor, "S V"] | None
    stop_ids: Int[Tensor, " E"]
    prompts: list[int] = field(default_factory=list)  # On the host: the prompt of each slot,
    lengths: list[int] = field(default_factory=list)  # and how many tokens it has, responses' included.

    @property
    def count(self) -> int:
        """How many are taken."""
        return len(self.prompts)

    def move(self, source: int, target: int) -> None:
        """Give the last slot's place in the batch to another."""
        for kept in (self.tokens, self.positions, self.steps, self.done, self.uniforms, self.ids, self.logprobs):
            kept[target] = kept[source]
        if self.seen is not None:
            self.seen[target] = self.seen[source]
        self.prompts[target], self.lengths[target] = self.prompts[source], self.lengths[source]


def empty_slots(weights: DecoderWeights, sampling: Sampling, size: int) -> Slots:
    """Slots for so many sequences of a model, none taken."""
    device, places, vocabulary = weights.device, sampling.max_new_tokens + 1, weights.head.features
    known = [stop_id for stop_id in sampling.stop_ids if stop_id < vocabulary]
    penalised = sampling.repetition_penalty != 1.0
    return Slots(
        tokens=torch.zeros(size, dtype=torch.long, device=device),
        positions=torch.zeros(size, dtype=torch.long, device=device),
        steps=torch.zeros(size, dtype=torch.long, device=device),
        done=torch.zeros(size, dtype=torch.bool, device=device),
        uniforms=torch.zeros(size, places, device=device),
        ids=torch.zeros(size, places, dtype=torch.long, device=device),
        logprobs=torch.zeros(size, places, device=device),
        seen=torch.zeros(size, vocabulary, dtype=torch.bool, device=device) if penalised else None,
        stop_ids=torch.tensor(known, dtype=torch.long, device=device),
    )
