"""The switch between training and generation: one engine whose present weights answer prompts, by the fastest way."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import psutil
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.batch import PromptBatch, Rollout
from rlhf.config.choices import RolloutBackend
from rlhf.config.errors import ConfigError
from rlhf.engine.distributed import RankGroup, local_world_size, world_size
from rlhf.engine.generation import generation_mode, is_partitioned, whole_parameters
from rlhf.models.decoder.parts import UnsupportedModelError, decoder_parts
from rlhf.models.decoder.weights import DecoderWeights, Share, generation_weights, needs_copy
from rlhf.models.lora import AdaptersOff, adapters_off
from rlhf.rollout.hf import generate_with_hf
from rlhf.rollout.native.arena import Arena, bytes_per_token
from rlhf.rollout.native.forward import Decoder
from rlhf.rollout.native.loop import Batch, Decoding, Response
from rlhf.rollout.sampling import Sampling, end_of_text

ARENA_SHARE = 0.5  # Of the free memory, that the cache may take.
KEPT_SHARE = 0.1  # Of the free memory, up to which the cache is kept between rollouts.


@dataclass(kw_only=True, slots=True)
class Generator:
    """Answers prompts with the present weights of an engine, under any ZeRO stage, adapted or not.

    Args:
        engine: the actor's engine, or what stands for the reference of an adapted one.
        tokenizer: gives EOS and PAD.
        sampling: how tokens are drawn.
        vocab_limit: ids from here on are never sampled.

    Attributes:
        native: whether tokens are decoded natively; otherwise transformers' `generate` does it.
        reason: why, in words.

    Raises:
        ConfigError: native decoding is asked for and not possible.
    """

    engine: Any
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    vocab_limit: int
    native: bool = field(init=False)
    reason: str = field(init=False)
    arena: Arena = field(init=False, default_factory=Arena)
    _ready: "_Ready | None" = field(init=False, default=None)
    _group: RankGroup | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.native, self.reason = self._choice()
        if self.native and self.sampling.tensor_parallel > 1:
            self._group = RankGroup(self.sampling.tensor_parallel)

    @property
    def description(self) -> str:
        """What generates, and why."""
        return f"{'native decoding' if self.native else 'transformers generate'} ({self.reason})"

    def fall_back(self, reason: str) -> None:
        """Generate with transformers from now on."""
        self.native, self.reason = False, reason
        self.arena.release()

    @contextmanager
    def generation_mode(self) -> Iterator[Any]:
        """Make the weights ready to generate with; every `generate` within this context uses them.

        Natively they are read once, gathered block by block under ZeRO-3, and copied where that, adapters, packing or
        tensor parallelism needs it: the engine's own weights are not touched. Otherwise it is the module itself, in
        `rlhf.engine.generation.generation_mode`. Every rank must enter and leave, and the engine must not be called
        within. Yields what generates.
        """
        if self._ready is not None:
            yield self._ready.model
            return
        engine, off = self._plain_engine()
        mode = self._weights(engine) if self.native else generation_mode(engine, gather=self.sampling.whole)
        try:
            with off, mode as model:
                self._ready = _Ready(model=model)
                yield model
                self._keep_cache()
        except BaseException:
            self.arena.release()
            raise
        finally:
            self._ready = None

    def generate(self, prompts: PromptBatch, *, seed: int = 0, streams: Int[Tensor, " B"] | None = None) -> Rollout:
        """Sample one response per prompt with the engine's present weights. Every rank must call.

        Args:
            prompts: left-padded prompts [B, P].
            seed: of the random numbers. transformers' `generate` draws torch's instead.
            streams: the number of each prompt's stream of random numbers, which decides its response, whatever prompts
                stand beside it and on whichever rank. If not given, numbers that depend on the prompts.

        Returns:
            A rollout whose responses are padded to the longest one on this rank (R >= 1).

        Raises:
            ConfigError: a prompt and the longest response exceed the model's positions, or the cache the memory.
        """
        check_length(self.engine.module.config, prompts.prompt_ids.shape[1], self.sampling.max_new_tokens)
        with self.generation_mode() as model:
            if self.native:
                return self._decoded(model, prompts, seed, prompt_streams(prompts) if streams is None else streams)
            return generate_with_hf(
                model,
                prompts,
                tokenizer=self.tokenizer,
                sampling=self.sampling,
                vocab_limit=self.vocab_limit,
                in_step=not self.sampling.whole and is_partitioned(self._plain_engine()[0]),
            )

    def _choice(self) -> tuple[bool, str]:
        wanted, engine = self.sampling.backend, self._plain_engine()[0]
        if wanted is RolloutBackend.hf:
            return False, "rollout.backend=hf"
        hindrance = None
        try:
            parts = decoder_parts(engine.module)
        except UnsupportedModelError as error:
            hindrance = f"native decoding does not know {error}"
        else:
            ranks = self.sampling.tensor_parallel
            if not self.sampling.gather and ranks == 1 and (is_partitioned(engine) or needs_copy(parts)):
                hindrance = (
                    "by the plan's estimate no copy of the policy fits beside the rest (rollout.gather=true makes one)"
                )
            if world_size() % ranks or parts.shape.heads % ranks or parts.shape.kv_heads % ranks:
                raise ConfigError(
                    f"rollout.tensor_parallel={ranks}: must divide the {world_size()} ranks, the {parts.shape.heads} "
                    f"heads and the {parts.shape.kv_heads} heads of keys and values"
                )
        if hindrance is None:
            shared = f"over {ranks} ranks each" if ranks > 1 else "on each rank"
            return True, f"{parts.shape.layers} blocks {shared}{', gathered once' if is_partitioned(engine) else ''}"
        if wanted is RolloutBackend.native:
            raise ConfigError(f"rollout.backend=native: {hindrance}; rollout.backend=auto takes what works")
        return False, hindrance

    def _plain_engine(self) -> tuple[Any, AbstractContextManager[None]]:
        """The engine itself, and a context in which its adapters are as they should be."""
        if isinstance(self.engine, AdaptersOff):
            return self.engine.engine, adapters_off(self.engine.module)
        return self.engine, _nothing()

    @contextmanager
    def _weights(self, engine: Any) -> Iterator[DecoderWeights]:
        yield generation_weights(
            decoder_parts(engine.module),
            vocab_limit=self.vocab_limit,
            rows=self.sampling.batch_size or 32,
            gather=partial(whole_parameters, engine),
            own=is_partitioned(engine),
            share=Share(rank=self._group.rank, ranks=self._group.size) if self._group is not None else None,
        )

    def _decoded(self, weights: DecoderWeights, prompts: PromptBatch, seed: int, streams: Tensor) -> Rollout:
        sampling, group = self.sampling, self._group
        rows = [row[mask] for row, mask in zip(prompts.prompt_ids, prompts.prompt_mask, strict=True)]
        first, count = 0, len(rows)
        if group is not None:
            shared = group.gather_objects(([row.cpu() for row in rows], streams.cpu()))
            rows = [row for part, _ in shared for row in part]
            streams = torch.cat([part for _, part in shared])
            first = sum(len(part) for part, _ in shared[: group.rank])
        slots = self._make_room(weights, count=len(rows), length=max(map(len, rows)) + sampling.max_new_tokens)
        decoding = Decoding(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            stop_ids=sampling.stop_ids,
            stops=partial(end_of_text, self.tokenizer, sampling.stop) if sampling.stop else None,
            min_new_tokens=sampling.min_new_tokens,
            max_new_tokens=sampling.max_new_tokens,
            seed=seed,
        )
        decoder = Decoder(weights=weights, reduce=group.add_up if group is not None else None)
        agree = group.take_first if group is not None else None
        batch = Batch(decoder, self.arena, rows, streams, decoding, slots=slots, agree=agree)
        responses = batch.run()[first : first + count]
        return _rollout(responses, prompts, pad_id=int(self.tokenizer.pad_token_id))

    def _make_room(self, weights: DecoderWeights, *, count: int, length: int) -> int:
        """Make the cache large enough, and return how many sequences are decoded together."""
        each = length * bytes_per_token(weights)
        free = free_bytes(weights.device) + self.arena.nbytes
        room = int(free * ARENA_SHARE // each)
        if self._group is not None:  # The group's ranks decode the same batch.
            room = min(self._group.gather_objects(room))
        if room < 1:
            raise ConfigError(
                f"the cache of keys and values of one sequence of {length} tokens takes {each / 2**20:.0f} MiB and "
                f"{free / 2**20:.0f} MiB are free: lower rollout.max_new_tokens or data.max_prompt_length"
            )
        slots = min(count, self.sampling.batch_size or count, room)
        self.arena.fit(weights, slots=slots, length=length)
        return slots

    def _keep_cache(self) -> None:
        """Give the cache back if it is to be."""
        release = self.sampling.release_cache
        if release is None and self.native:
            large = bool(self.arena.keys) and self.arena.nbytes > KEPT_SHARE * free_bytes(self.arena.keys[0].device)
            # Ranks that share the weights keep the same.
            release = any(self._group.gather_objects(large)) if self._group is not None else large
        if release:
            self.arena.release()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ready:
    model: Any


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def check_length(config: Any, prompt_length: int, max_new_tokens: int) -> None:
    """Raise ConfigError if a prompt and the longest response to it exceed a model's positions."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and prompt_length + max_new_tokens > positions:
        raise ConfigError(
            f"a prompt of {prompt_length} tokens and rollout.max_new_tokens={max_new_tokens} (null: "
            f"data.max_response_length) take more than the model's {positions} positions: lower one of them"
        )


def free_bytes(device: torch.device) -> int:
    """Memory that this process may still take: of its GPU, or its share of the host's."""
    if device.type == "cuda":
        # What torch has reserved and not given out is free, too.
        spare = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + spare
    return int(psutil.virtual_memory().available) // local_world_size()


def prompt_streams(prompts: PromptBatch) -> Int[Tensor, " B"]:
    """A number for each prompt that depends on its tokens, and on how often it stood before it in the batch."""
    seen: dict[tuple[int, ...], int] = {}
    numbers = []
    for row, mask in zip(prompts.prompt_ids.cpu(), prompts.prompt_mask.cpu(), strict=True):
        ids = tuple(row[mask].tolist())
        seen[ids] = seen.get(ids, 0) + 1
        numbers.append(hash((seen[ids], *ids)) >> 1)  # A hash of integers: the same in every process.
    return torch.tensor(numbers)


def _rollout(responses: list[Response], prompts: PromptBatch, *, pad_id: int) -> Rollout:
    device = prompts.prompt_ids.device

    def padded(rows: list[Tensor], value: float) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value).to(device)

    ids = padded([response.ids for response in responses], pad_id)
    lengths = torch.tensor([len(response.ids) for response in responses], device=device)
    return Rollout(
        sequence_ids=torch.cat([prompts.prompt_ids, ids], dim=1),
        prompt_mask=prompts.prompt_mask,
        response_mask=torch.arange(ids.shape[1], device=device) < lengths.unsqueeze(1),
        ended=torch.tensor([response.ended for response in responses], device=device),
        sampled_logprobs=padded([response.logprobs for response in responses], 0.0),
    )
