"""Continuous batching: finished sequences leave the batch, and waiting prompts take their place."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.functional.sampling import draw, penalise_repetition, restrict, stream_keys, stream_uniforms
from rlhf.rollout.native.arena import Arena
from rlhf.rollout.native.forward import Decoder
from rlhf.rollout.responses import Response
from rlhf.rollout.sampling import Sampling

PREFILL_TOKENS = 4096  # At most in one piece, counted as if all were as long as the first; a longer prompt is alone.
GPU_CHECK_EVERY = 8  # Tokens between two looks at what has finished: each look waits for the device.


@dataclass(slots=True)
class _Slots:
    """What is known of the sequences in the batch, on the device. The first `count` slots are taken."""

    tokens: Int[Tensor, " S"]
    positions: Int[Tensor, " S"]
    steps: Int[Tensor, " S"]
    done: Bool[Tensor, " S"]
    uniforms: Float[Tensor, "S M"]
    ids: Int[Tensor, "S M"]
    logprobs: Float[Tensor, "S M"]
    seen: Bool[Tensor, "S V"] | None
    prompts: list[int] = field(default_factory=list)  # On the host: the prompt of each slot,
    lengths: list[int] = field(default_factory=list)  # and how many tokens it has, responses' included.

    @property
    def count(self) -> int:
        return len(self.prompts)

    def move(self, source: int, target: int) -> None:
        """Give the last slot's place in the batch to another."""
        for kept in (self.tokens, self.positions, self.steps, self.done, self.uniforms, self.ids, self.logprobs):
            kept[target] = kept[source].clone()
        if self.seen is not None:
            self.seen[target] = self.seen[source].clone()
        self.prompts[target], self.lengths[target] = self.prompts[source], self.lengths[source]


class Batch:
    """One rollout: prompts that wait, those in the batch, and responses that are finished.

    Args:
        decoder: the model.
        arena: the cache; its slots bound the batch.
        prompts: token ids of each, without padding.
        streams: the number of each prompt's stream of random numbers.
        sampling: how tokens are chosen and where a response ends.
        seed: of the streams of random numbers.
        stops: from the tokens so far to how many of them the response has if it ends there, else None.
        slots: sequences that are decoded together at most; as many as the cache has slots if not given.
        agree: makes sampled tokens equal on ranks that decode the same prompts together; None without such.
    """

    def __init__(
        self,
        decoder: Decoder,
        arena: Arena,
        prompts: Sequence[Int[Tensor, " _"]],
        streams: Int[Tensor, " n"],
        sampling: Sampling,
        *,
        seed: int = 0,
        stops: Callable[[list[int]], int | None] | None = None,
        slots: int | None = None,
        agree: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.decoder, self.arena, self.prompts, self.sampling = decoder, arena, prompts, sampling
        self.stops, self.agree = stops, agree
        device, longest = decoder.weights.device, sampling.max_new_tokens
        # The longest first: what runs together then ends together, and little is padded.
        self.waiting = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), -index))
        self.finished: dict[int, tuple[Tensor, Tensor, bool]] = {}
        self.uniforms = stream_uniforms(stream_keys(streams, seed=seed), longest).to(device)
        size, vocabulary = min(slots or arena.slots, len(prompts)), decoder.weights.head.features
        integers = torch.zeros(size, dtype=torch.long, device=device)
        self.slots = _Slots(
            tokens=integers.clone(),
            positions=integers.clone(),
            steps=integers.clone(),
            done=torch.zeros(size, dtype=torch.bool, device=device),
            uniforms=torch.zeros(size, longest, device=device),
            ids=torch.zeros(size, longest, dtype=torch.long, device=device),
            logprobs=torch.zeros(size, longest, device=device),
            seen=torch.zeros(size, vocabulary, dtype=torch.bool, device=device)
            if sampling.repetition_penalty != 1.0
            else None,
        )
        self.size = size
        known = [stop_id for stop_id in sampling.stop_ids if stop_id < vocabulary]
        self.stop_ids = torch.tensor(known, dtype=torch.long, device=device)
        self.check_every = 1 if device.type == "cpu" else GPU_CHECK_EVERY

    def run(self) -> list[Response]:
        """All responses, in the order of the prompts."""
        with torch.inference_mode():
            while self.waiting or self.slots.count:
                if self.waiting and self._room_is_worth_it():
                    self._admit()
                else:
                    for _ in range(min(self.check_every, self._most_steps_left())):
                        self._step()
                self._retire()
        # What was made in inference mode could not take part in training.
        ordered = [self.finished[index] for index in range(len(self.prompts))]
        return [Response(ids=ids.clone(), logprobs=logprobs.clone(), ended=ended) for ids, logprobs, ended in ordered]

    def _room_is_worth_it(self) -> bool:
        """Prompts come in several at a time: one alone costs almost as much as a step of the whole batch."""
        free = self.size - self.slots.count
        return free == self.size or free >= min(len(self.waiting), max(1, self.size // 4))

    def _most_steps_left(self) -> int:
        slots = self.slots
        done = [slots.lengths[slot] - len(self.prompts[slots.prompts[slot]]) for slot in range(slots.count)]
        return self.sampling.max_new_tokens - min(done)

    def _admit(self) -> None:
        """Run waiting prompts, as many as there is room for, and choose the first token of each response."""
        slots, first = self.slots, self.slots.count
        chosen = [self.waiting.pop()]
        longest = len(self.prompts[chosen[0]])
        while self.waiting and first + len(chosen) < self.size and (len(chosen) + 1) * longest <= PREFILL_TOKENS:
            chosen.append(self.waiting.pop())
        device = self.decoder.weights.device
        taken = torch.arange(first, first + len(chosen), device=device)
        prompts = [self.prompts[index] for index in chosen]
        logits = self.decoder.prefill(prompts, taken, self.arena)
        slots.prompts += chosen
        slots.lengths += [len(prompt) for prompt in prompts]
        where = slice(first, first + len(chosen))
        slots.positions[where] = torch.tensor([len(prompt) for prompt in prompts], device=device) - 1
        slots.steps[where], slots.done[where] = 0, False
        slots.uniforms[where] = self.uniforms[torch.tensor(chosen, device=device)]
        if slots.seen is not None:
            slots.seen[where] = False
            for slot, prompt in enumerate(prompts, first):
                slots.seen[slot, prompt[prompt < slots.seen.shape[1]]] = True
        self._choose(logits, where)

    def _step(self) -> None:
        """One more token of every sequence in the batch."""
        slots, count = self.slots, self.slots.count
        logits = self.decoder.decode(
            slots.tokens[:count], slots.positions[:count], self.arena, length=max(slots.lengths)
        )
        self._choose(logits, slice(0, count))

    def _choose(self, logits: Float[Tensor, "n V"], where: slice) -> None:
        """Choose and note the next token of some slots."""
        slots, sampling = self.slots, self.sampling
        steps = slots.steps[where]
        if sampling.temperature not in (0.0, 1.0):
            logits = logits / sampling.temperature
        ids, logprobs = self._chosen(logits, where, steps)
        if self.agree is not None:
            drawn = torch.stack([ids.double(), logprobs.double()])
            self.agree(drawn)
            ids, logprobs = drawn[0].long(), drawn[1].float()
        rows = torch.arange(where.start, where.stop, device=ids.device)
        # A sequence that has ended but was not seen to writes on behind its end, where nothing is read.
        place = steps.clamp(max=sampling.max_new_tokens - 1)
        slots.ids[rows, place] = torch.where(slots.done[where], slots.ids[rows, place], ids)
        slots.logprobs[rows, place] = torch.where(slots.done[where], slots.logprobs[rows, place], logprobs)
        slots.steps[where] += (~slots.done[where]).long()
        slots.done[where] |= torch.isin(ids, self.stop_ids) | (slots.steps[where] >= sampling.max_new_tokens)
        slots.tokens[where] = ids
        slots.positions[where] = (slots.positions[where] + 1).clamp(max=self.arena.length - 1)
        for slot in range(where.start, where.stop):
            slots.lengths[slot] = min(slots.lengths[slot] + 1, self.arena.length)
        if slots.seen is not None:
            slots.seen[rows, ids] = True

    def _chosen(
        self, logits: Float[Tensor, "n V"], where: slice, steps: Int[Tensor, " n"]
    ) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
        slots, sampling = self.slots, self.sampling
        allowed = logits
        if slots.seen is not None:
            allowed = penalise_repetition(allowed, slots.seen[where], penalty=sampling.repetition_penalty)
        if sampling.min_new_tokens:
            early = (steps < sampling.min_new_tokens).unsqueeze(1)
            allowed = allowed.clone()
            allowed[:, self.stop_ids] = allowed[:, self.stop_ids].masked_fill(early, -torch.inf)
        if sampling.temperature == 0.0:
            ids = allowed.argmax(dim=1)
        else:
            if sampling.restricted:
                allowed = restrict(allowed, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p)
            uniforms = slots.uniforms[where].gather(1, steps.clamp(max=sampling.max_new_tokens - 1).unsqueeze(1))
            ids, logprobs = draw(allowed, uniforms.squeeze(1))
            if allowed is logits:
                return ids, logprobs
        return ids, logits.gather(1, ids.unsqueeze(1)).squeeze(1) - logits.logsumexp(dim=1)

    def _retire(self) -> None:
        """Take finished sequences out of the batch; the last ones move into their places."""
        slots, count = self.slots, self.slots.count
        done, steps = slots.done[:count].tolist(), slots.steps[:count].tolist()
        for slot in reversed(range(count)):
            length, cut = steps[slot], None
            if self.stops is not None:
                cut = self.stops(slots.ids[slot, :length].tolist())
            if not done[slot] and cut is None:
                continue
            length = min(length, cut or length)
            ids, logprobs = slots.ids[slot, :length].clone(), slots.logprobs[slot, :length].clone()
            ended = cut is not None or int(ids[-1]) in self.sampling.stop_ids
            self.finished[slots.prompts[slot]] = ids, logprobs, ended
            last = slots.count - 1
            if slot != last:
                self.arena.move(last, slot, length=slots.lengths[last])
                slots.move(last, slot)
            slots.prompts.pop()
            slots.lengths.pop()
