"""Native decoding with an engine's present weights."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import psutil
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.batch import PromptBatch, Rollout
from rlhf.config.errors import ConfigError
from rlhf.engine.distributed import RankGroup, local_world_size
from rlhf.engine.generation import count_together, is_partitioned, whole_parameters
from rlhf.models.decoder.parts import UnsupportedModelError, decoder_parts
from rlhf.models.decoder.weights import DecoderWeights, Share, adapters, generation_weights
from rlhf.planner.memory import CACHE_SHARE
from rlhf.rollout.native.arena import Arena, bytes_per_token
from rlhf.rollout.native.compiled import CompiledBlocks, reason_against
from rlhf.rollout.native.forward import Decoder
from rlhf.rollout.native.graphs import StepGraphs
from rlhf.rollout.native.library import NotCompiledError, load_library
from rlhf.rollout.native.loop import Batch
from rlhf.rollout.responses import Response, answer_together
from rlhf.rollout.sampling import Sampling, end_of_text

KEPT_SHARE = 0.1  # Of the free memory, up to which the cache is kept between rollouts.


class NativeBackend:
    """Copies the weights where it must, and decodes in this process.

    Args:
        engine: whose weights generate.
        tokenizer: gives PAD and the texts of tokens.
        sampling: how tokens are drawn.
        vocab_limit: ids from here on are never sampled.

    Raises:
        UnsupportedModelError: the model is not known, or is partitioned and is not to be copied.
        ConfigError: the ranks or the heads cannot be divided by `sampling.tensor_parallel`.
    """

    def __init__(
        self, engine: Any, *, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, vocab_limit: int
    ) -> None:
        parts, ranks = decoder_parts(engine.module), sampling.tensor_parallel
        if not sampling.gather and ranks == 1 and is_partitioned(engine):
            raise UnsupportedModelError(
                "a partitioned policy of which no copy fits beside the rest by the plan's estimate "
                "(rollout.gather=true makes one)"
            )
        if parts.shape.heads % ranks or parts.shape.kv_heads % ranks:
            raise ConfigError(
                f"rollout.tensor_parallel={ranks}: must divide the {parts.shape.heads} heads and the "
                f"{parts.shape.kv_heads} heads of keys and values"
            )
        self.engine, self.tokenizer, self.sampling, self.vocab_limit = engine, tokenizer, sampling, vocab_limit
        self.group = RankGroup(ranks) if ranks > 1 else None
        self.arena = Arena()
        self.parts = replace(parts, shape=parts.shape.to(engine.device))
        # Ranks that share the weights add up their parts between the kernels, which is not recorded.
        on_gpu = torch.device(engine.device).type == "cuda"
        self.graphs = StepGraphs(record=self.group is None) if on_gpu else None
        self.copies = sampling.gather or ranks > 1
        shared = f"over {ranks} ranks each" if ranks > 1 else "on each rank"
        how = ", gathered for each rollout" if is_partitioned(engine) else "" if self.copies else ", nothing copied"
        self.library, found = self._find_library(on_gpu=on_gpu)
        how += found
        self.description = f"native decoding ({parts.shape.layers} blocks {shared}{how})"
        self._weights: DecoderWeights | None = None

    def _find_library(self, *, on_gpu: bool) -> tuple[ctypes.CDLL | None, str]:
        """The compiled part, if it can be used, and what is said about it."""
        if on_gpu or self.group is not None:
            return None, ""
        against = reason_against(self.parts, merged=self.copies)
        try:
            if against is None:
                return load_library(), ", compiled"
        except NotCompiledError as error:
            against = str(error)
        return None, f", not compiled: {against}"

    @contextmanager
    def mode(self) -> Iterator[DecoderWeights]:
        """Within this context the weights are as they were when it began; its memory comes back."""
        # Compiled blocks read weights as they are: also those that were put together, then all at once, unless adapters
        # are merged: beside the weights into which they are, those from which they are would stay.
        as_they_are, layers = self.library is not None, self.parts.layers
        keeps = as_they_are and not any(map(adapters, self.parts.dense()))
        try:
            self._weights = generation_weights(
                self.parts,
                vocab_limit=self.vocab_limit,
                rows=None if as_they_are else self.sampling.batch_size or 32,
                gather=partial(whole_parameters, self.engine),
                own=is_partitioned(self.engine) and not keeps,
                share=Share(rank=self.group.rank, ranks=self.group.size) if self.group is not None else None,
                copy=self.copies,
                together=len(layers) if keeps else count_together(self.engine, layers[0].module),
            )
            yield self._weights
            self._keep_cache(self._weights)
        except BaseException:
            self.release()
            raise
        finally:
            self._weights = None

    def generate(self, prompts: PromptBatch, *, seed: int, streams: Int[Tensor, " B"]) -> Rollout:
        """Answer prompts, within `mode`."""
        pad_id = int(self.tokenizer.pad_token_id)
        return answer_together(prompts, streams, partial(self._answer, seed=seed), group=self.group, pad_id=pad_id)

    def release(self) -> None:
        """Give all memory back."""
        self.arena.release()
        if self.graphs is not None:
            self.graphs.release()

    def _answer(self, rows: list[Int[Tensor, " _"]], streams: Int[Tensor, " n"], *, seed: int) -> list[Response]:
        sampling, weights = self.sampling, self._weights
        assert weights is not None, "generate is called within mode"
        longest = max(map(len, rows)) + sampling.max_new_tokens
        # Fast attention on a GPU wants multiples of eight; no position may lie behind the model's last.
        rounded = longest + -longest % 8
        most = getattr(self.engine.module.config, "max_position_embeddings", None) or rounded
        slots = self._make_room(weights, count=len(rows), length=rounded if rounded <= most else longest)
        stops = partial(end_of_text, self.tokenizer, sampling.stop) if sampling.stop else None
        reduce = self.group.add_up if self.group is not None else None
        decoder = Decoder(weights=weights, reduce=reduce, compiled=self._compiled(weights))
        agree = self.group.take_first if self.group is not None else None
        options: dict[str, Any] = {"seed": seed, "stops": stops, "slots": slots, "agree": agree, "graphs": self.graphs}
        return Batch(decoder, self.arena, rows, streams, sampling, **options).run()

    def _compiled(self, weights: DecoderWeights) -> CompiledBlocks | None:
        if self.library is None:
            return None
        return CompiledBlocks(self.library, weights, self.arena)

    def _make_room(self, weights: DecoderWeights, *, count: int, length: int) -> int:
        """Make the cache large enough, and return how many sequences are decoded together."""
        each = length * bytes_per_token(weights)
        free = free_bytes(weights.device) + self.arena.nbytes
        if self.graphs is not None:  # What recording took stays its own.
            free -= self.graphs.nbytes
        if self.group is not None:  # The group's ranks decode the same batch.
            free = min(self.group.gather_objects(free))
        room = int(free * CACHE_SHARE // each)
        if room < 1:
            raise ConfigError(
                f"the cache of keys and values of one sequence of {length} tokens takes {each / 2**20:.2f} MiB, but at "
                f"most {CACHE_SHARE:.0%} of the {free / 2**20:.2f} MiB that are free may be taken: lower "
                "rollout.max_new_tokens, data.max_prompt_length or data.max_response_length, or make room "
                "(memory=zero3, lora=r8)"
            )
        slots = min(count, self.sampling.batch_size or count, room)
        self.arena.fit(weights, slots=slots, length=length)
        return slots

    def _keep_cache(self, weights: DecoderWeights) -> None:
        """Give the cache back if it is to be, and what was recorded with weights that are gone."""
        if self.graphs is not None:
            own = {parameter.data_ptr() for parameter in self.engine.module.parameters()}
            tables = (table for table in (self.parts.shape.rotary, self.parts.shape.alibi) if table is not None)
            own.update(table.data_ptr() for table in tables)
            if any(tensor.data_ptr() not in own for tensor in weights.tensors()):
                self.graphs.forget()
        release = self.sampling.release_cache
        if release is None:
            taken = self.arena.nbytes + (self.graphs.nbytes if self.graphs is not None else 0)
            large = bool(self.arena.layers) and taken > KEPT_SHARE * free_bytes(weights.device)
            # Ranks that share the weights keep the same.
            release = any(self.group.gather_objects(large)) if self.group is not None else large
        if release:
            self.release()


def free_bytes(device: torch.device) -> int:
    """Memory that this process may still take: of its GPU, or its share of the host's."""
    if device.type == "cuda":
        # What torch has reserved and not given out is free, too.
        spare = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + spare
    return int(psutil.virtual_memory().available) // local_world_size()
