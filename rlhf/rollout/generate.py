"""The switch between training and generation: one engine whose present weights answer prompts, by the fastest way."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.batch import PromptBatch, Rollout
from rlhf.config.choices import RolloutBackend
from rlhf.config.errors import ConfigError
from rlhf.engine.distributed import world_size
from rlhf.models.decoder.parts import UnsupportedModelError
from rlhf.models.lora import AdaptersOff, adapters_off
from rlhf.rollout.hf import HfBackend
from rlhf.rollout.native.backend import NativeBackend
from rlhf.rollout.sampling import Sampling
from rlhf.rollout.vllm import VllmBackend


@runtime_checkable
class Backend(Protocol):
    """One way to generate."""

    description: str

    def mode(self) -> AbstractContextManager[Any]:
        """Make an engine's present weights ready to generate with."""

    def generate(self, prompts: PromptBatch, *, seed: int, streams: Int[Tensor, " B"]) -> Rollout:
        """Answer prompts, within `mode`."""

    def release(self) -> None:
        """Give all memory back."""


class Generator:
    """Answers prompts with the present weights of an engine, under any ZeRO stage, adapted or not.

    Args:
        engine: the actor's engine, or what stands for the reference of an adapted one.
        tokenizer: gives EOS and PAD.
        sampling: how tokens are drawn, and by what.
        vocab_limit: ids from here on are never sampled.

    Attributes:
        backend: what generates.

    Raises:
        ConfigError: the backend that is asked for cannot do it.
    """

    def __init__(
        self, *, engine: Any, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, vocab_limit: int
    ) -> None:
        if world_size() % sampling.tensor_parallel:
            raise ConfigError(
                f"rollout.tensor_parallel={sampling.tensor_parallel}: must divide the {world_size()} ranks"
            )
        self.engine, self.tokenizer, self.sampling, self.vocab_limit = engine, tokenizer, sampling, vocab_limit
        self._plain = engine.engine if isinstance(engine, AdaptersOff) else engine
        self.backend: Backend = self._chosen()
        self._ready: Any = None

    @property
    def native(self) -> bool:
        """Whether tokens are decoded natively."""
        return isinstance(self.backend, NativeBackend)

    @property
    def gives_logprobs(self) -> bool:
        """Whether the log-probabilities with which tokens were drawn come with a rollout."""
        return self.native or (isinstance(self.backend, VllmBackend) and self.sampling.unbiased)

    @property
    def description(self) -> str:
        """What generates, and what ends a response where that is more than the tokenizer's EOS."""
        if self.sampling.stop_ids == (self.tokenizer.eos_token_id,):
            return self.backend.description
        ends = ", ".join(map(str, self.tokenizer.convert_ids_to_tokens(list(self.sampling.stop_ids))))
        return f"{self.backend.description}; a response ends with {ends}"

    def fall_back(self, reason: str) -> None:
        """Generate with transformers from now on."""
        self.backend.release()
        self.backend = self._hf(reason)

    @contextmanager
    def generation_mode(self) -> Iterator[Any]:
        """Make the weights ready to generate with; every `generate` within this context uses them.

        Natively they are read once, gathered under ZeRO-3, and copied where that, adapters, packing or tensor
        parallelism needs it: the engine's own weights are not touched. vLLM gets a copy in memory. Otherwise it is the
        module itself, in `rlhf.engine.generation.generation_mode`. Every rank must enter and leave, and the
        engine must not be called within. Yields what generates.
        """
        if self._ready is not None:
            yield self._ready
            return
        off = adapters_off(self._plain.module) if isinstance(self.engine, AdaptersOff) else nullcontext()
        try:
            with off, self.backend.mode() as self._ready:
                yield self._ready
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
        check_length(self._plain.module.config, prompts.prompt_ids.shape[1], self.sampling.max_new_tokens)
        with self.generation_mode():
            own = prompt_streams(prompts) if streams is None else streams
            return self.backend.generate(prompts, seed=seed, streams=own)

    def _chosen(self) -> Backend:
        wanted = self.sampling.backend
        options: dict[str, Any] = {
            "tokenizer": self.tokenizer,
            "sampling": self.sampling,
            "vocab_limit": self.vocab_limit,
        }
        if wanted is RolloutBackend.hf:
            return self._hf("rollout.backend=hf")
        if wanted is RolloutBackend.vllm:
            return VllmBackend(self._plain, **options)
        try:
            return NativeBackend(self._plain, **options)
        except UnsupportedModelError as error:
            hindrance = f"native decoding does not do it for {error}"
        if wanted is RolloutBackend.native:
            raise ConfigError(f"rollout.backend=native: {hindrance}; rollout.backend=auto takes what works")
        ranks = self.sampling.tensor_parallel
        return self._hf(hindrance if ranks == 1 else f"{hindrance}; rollout.tensor_parallel={ranks} does nothing")

    def _hf(self, reason: str) -> HfBackend:
        return HfBackend(
            self._plain,
            tokenizer=self.tokenizer,
            sampling=self.sampling,
            vocab_limit=self.vocab_limit,
            reason=reason,
        )


def check_length(config: Any, prompt_length: int, max_new_tokens: int) -> None:
    """Raise ConfigError if a prompt and the longest response to it exceed a model's positions."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and prompt_length + max_new_tokens > positions:
        raise ConfigError(
            f"a prompt of {prompt_length} tokens and rollout.max_new_tokens={max_new_tokens} (null: "
            f"data.max_response_length) take more than the model's {positions} positions: lower one of them"
        )


def prompt_streams(prompts: PromptBatch) -> Int[Tensor, " B"]:
    """A number for each prompt that depends on its tokens, and on how often it stood before it in the batch."""
    seen: dict[tuple[int, ...], int] = {}
    numbers = []
    for row, mask in zip(prompts.prompt_ids.cpu(), prompts.prompt_mask.cpu(), strict=True):
        ids = tuple(row[mask].tolist())
        seen[ids] = seen.get(ids, 0) + 1
        numbers.append(hash((seen[ids], *ids)) >> 1)  # A hash of integers: the same in every process.
    return torch.tensor(numbers)
