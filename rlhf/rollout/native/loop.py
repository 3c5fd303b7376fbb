"""Continuous batching: finished sequences leave the batch, and waiting prompts take their place."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlhf.functional.sampling import draw, penalise_repetition, restrict, stream_keys, stream_uniforms
from rlhf.rollout.native.arena import Arena
from rlhf.rollout.native.forward import Decoder
from rlhf.rollout.native.graphs import StepGraphs
from rlhf.rollout.native.slots import empty_slots
from rlhf.rollout.responses import Response
from rlhf.rollout.sampling import Sampling

PREFILL_TOKENS = 4096  # At most in one piece, counted as if all were as long as the first; a longer prompt is alone.
GPU_CHECK_EVERY = 8  # Tokens between two looks at what has finished: each look waits for the device.


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
        graphs: replays steps on a GPU, in few sizes; None: each step is run, in its exact size.
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
        graphs: StepGraphs | None = None,
    ) -> None:
        self.decoder, self.arena, self.prompts, self.sampling = decoder, arena, prompts, sampling
        self.stops, self.agree, self.graphs = stops, agree, graphs
        weights = decoder.weights
        # The longest first: what runs together then ends together, and little is padded.
        self.waiting = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), -index))
        self.finished: dict[int, tuple[Tensor, Tensor, bool]] = {}
        keys = stream_keys(streams, seed=seed)
        self.uniforms = stream_uniforms(keys, sampling.max_new_tokens).to(weights.device)
        self.size = min(slots or arena.slots, len(prompts))
        if graphs is None:
            self.slots = empty_slots(weights, sampling, self.size)
        else:
            self.slots = graphs.slots(weights, arena, sampling, self.size)
        self.check_every = 1 if weights.device.type == "cpu" else GPU_CHECK_EVERY

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
        prompts = [self.prompts[index] for index in chosen]
        logits = self.decoder.prefill(prompts, first, self.arena)
        slots.prompts += chosen
        slots.lengths += [len(prompt) for prompt in prompts]
        where = slice(first, first + len(chosen))
        slots.positions[where] = torch.tensor([len(prompt) for prompt in prompts], device=device) - 1
        slots.steps[where], slots.done[where] = 0, False
        slots.uniforms[where, :-1] = self.uniforms[torch.tensor(chosen, device=device)]
        if slots.seen is not None:
            slots.seen[where] = False
            for slot, prompt in enumerate(prompts, first):
                slots.seen[slot, prompt[prompt < slots.seen.shape[1]]] = True
        self._choose(logits, where)
        self._count_on(first)

    def _step(self) -> None:
        """One more token of every sequence in the batch."""
        count, length = self.slots.count, max(self.slots.lengths)
        if self.graphs is None:
            self._advance(count, length)
        else:
            size, room = len(self.slots.tokens), self.arena.length
            kind = self.graphs.sizes(count=count, length=length, size=size, room=room)
            self.graphs.step(kind, partial(self._advance, *kind))
        self._count_on(0)

    def _advance(self, count: int, length: int) -> None:
        """What of a step is done on the device: the next token of the first slots, taken or not."""
        slots = self.slots
        logits = self.decoder.decode(slots.tokens[:count], slots.positions[:count], self.arena, length=length)
        self._choose(logits, slice(0, count))

    def _count_on(self, first: int) -> None:
        """Note that the sequences from a slot on have one token more."""
        lengths = self.slots.lengths
        lengths[first:] = [min(length + 1, self.arena.length) for length in lengths[first:]]

    def _choose(self, logits: Float[Tensor, "n V"], where: slice) -> None:
        """Choose and note the next token of some slots."""
        slots, sampling = self.slots, self.sampling
        steps, done = slots.steps[where], slots.done[where]
        if not (sampling.unbiased and sampling.temperature == 1.0):  # Else they are taken as they are.
            logits = logits.float()
        if sampling.temperature not in (0.0, 1.0):
            logits = logits / sampling.temperature
        ids, logprobs = self._chosen(logits, where, steps)
        if self.agree is not None:
            drawn = torch.stack([ids.double(), logprobs.double()])
            self.agree(drawn)
            ids, logprobs = drawn[0].long(), drawn[1].float()
        # A sequence that has ended but was not seen to writes on behind its end, where nothing is read.
        place = steps.unsqueeze(1)
        slots.ids[where].scatter_(1, place, ids.unsqueeze(1))
        slots.logprobs[where].scatter_(1, place, logprobs.unsqueeze(1))
        steps += ~done
        done |= (ids.unsqueeze(1) == slots.stop_ids).any(dim=1)
        done |= steps >= sampling.max_new_tokens
        slots.tokens[where] = ids
        slots.positions[where].add_(1).clamp_(max=self.arena.length - 1)
        if slots.seen is not None:
            slots.seen[where].scatter_(1, ids.unsqueeze(1), True)

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
            allowed[:, slots.stop_ids] = allowed[:, slots.stop_ids].masked_fill(early, -torch.inf)
        if sampling.temperature == 0.0:
            ids = allowed.argmax(dim=1)
        else:
            if sampling.restricted:
                allowed = restrict(allowed, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p)
            uniforms = slots.uniforms[where].gather(1, steps.unsqueeze(1))
            ids, logprobs = draw(allowed, uniforms.squeeze(1))
            if allowed is logits:
                return ids, logprobs
        return ids, logits.gather(1, ids.unsqueeze(1)).squeeze(1) - logits.logsumexp(dim=1)

    def _retire(self) -> None:
        """Take finished sequences out of the batch; the last ones move into their places."""
        slots, count = self.slots, self.slots.count
        done = slots.done[:count].tolist()
        if self.stops is None and not any(done):
            return
        steps = slots.steps[:count].tolist()
        ids_so_far = slots.ids[:count].tolist() if self.stops is not None else []
        for slot in reversed(range(count)):
            length, cut = steps[slot], None
            if self.stops is not None:
                cut = self.stops(ids_so_far[slot][:length])
            if not done[slot] and cut is None:
                continue
            length = min(length, cut or length)
            ids, logprobs = slots.ids[slot, :length].clone(), slots.logprobs[slot, :length].clone()
            ended = cut is not None or int(ids[-1]) in self.sampling.stop_ids
            self.finished[slots.prompts[slot]] = ids, logprobs, ended
            last = slots.count - 1
            if slot != last:
                self.arena.move(last, slot)
                slots.move(last, slot)
            slots.prompts.pop()
            slots.lengths.pop()
