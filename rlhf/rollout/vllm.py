"""Generation with vLLM in the training process: it gets the weights in memory and sleeps while training."""

import copy
import os
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.batch import PromptBatch, Rollout
from rlhf.config.errors import ConfigError
from rlhf.engine.distributed import RankGroup, kept_random_state
from rlhf.engine.generation import is_partitioned, whole_parameters
from rlhf.functional.sampling import stream_keys
from rlhf.models.decoder.weights import plain_weights
from rlhf.rollout.responses import Response, answer_together
from rlhf.rollout.sampling import Sampling, end_of_text
from rlhf.rollout.vllm_version import check_installed

CPU_CACHE_BYTES = 2**30
SHARED_MEMORY = Path("/dev/shm")
GPU_SHARE = 0.3  # Of a GPU's memory, while it is awake.


def _remove_left_memory(group: RankGroup) -> None:
    """Remove what an earlier run left where vLLM's ranks on a CPU exchange data.

    vLLM names it by the ranks' numbers alone, leaves it behind and does not start where it exists. A run that has
    started keeps what it has open. Every rank of the group must call.

    Raises:
        ConfigError: it is there and cannot be removed.
    """
    own = f"-[{'-'.join(map(str, group.members))}]-cpushm_{group.rank}"
    for path in SHARED_MEMORY.glob("*cpushm_*"):
        if path.name.endswith(own):
            try:
                path.unlink()
            except OSError as error:
                raise ConfigError(
                    f"rollout=vllm: vLLM does not start while {path} of an earlier run exists, and it cannot be "
                    f"removed ({error.strerror}): remove it"
                ) from error
    group.gather_objects(None)  # No rank starts before all have removed theirs.


class VllmBackend:
    """A vLLM engine on each rank, or over several neighbouring ranks, beside the training engines.

    Args:
        engine: whose weights generate.
        tokenizer: of the model.
        sampling: how tokens are drawn.
        vocab_limit: ids from here on are never sampled.

    Raises:
        ConfigError: vLLM is missing, of another version, or does not support the model.
    """

    def __init__(
        self, engine: Any, *, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, vocab_limit: int
    ) -> None:
        version = check_installed()
        self.engine, self.tokenizer, self.sampling, self.vocab_limit = engine, tokenizer, sampling, vocab_limit
        self.group = RankGroup(sampling.tensor_parallel) if sampling.tensor_parallel > 1 else None
        self.on_gpu = engine.device.type == "cuda"
        self.description = f"vLLM {version}, over {sampling.tensor_parallel} ranks each"
        # In this process, where its model can be given weights; the launcher's variables say which rank this is.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("LOCAL_RANK", "0")
        if not self.on_gpu:
            torch.cpu._init_amx()  # vLLM's kernels do not ask Linux for Intel's matrix unit before they use it.
            if self.group is not None:
                _remove_left_memory(self.group)
        with _own_threads(), kept_random_state(), tempfile.TemporaryDirectory() as folder:
            try:
                self.llm = self._started(folder)
                # Some of what it does not support it tells only then.
                self.llm.generate([{"prompt_token_ids": [0]}], self._parameters(max_tokens=1), use_tqdm=False)
            except Exception as error:  # Of whatever kind: of another package, which ends before training then.
                raise ConfigError(
                    f"rollout=vllm: vLLM {version} cannot generate with this model here: "
                    f"{type(error).__name__}: {error}; rollout=auto needs no vLLM"
                ) from error
        if self.on_gpu:
            self.llm.sleep(level=2)

    def _started(self, folder: str) -> Any:
        import vllm

        self._parameters = vllm.SamplingParams
        model = self.engine.module
        # Weights that vLLM ties are lost when they are handed over: the output layer gets its own.
        config = copy.deepcopy(model.config)
        config.tie_word_embeddings, config.architectures = False, [type(model).__name__]
        config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        place: dict[str, Any] = (
            {"enable_sleep_mode": True, "gpu_memory_utilization": GPU_SHARE}
            if self.on_gpu
            else {"kv_cache_memory_bytes": CPU_CACHE_BYTES, "enforce_eager": True}
        )
        return vllm.LLM(
            model=folder,
            load_format="dummy",
            dtype=model.dtype,
            tensor_parallel_size=self.sampling.tensor_parallel,
            distributed_executor_backend="external_launcher",
            max_model_len=self.sampling.max_length,
            logprobs_mode="processed_logprobs",
            enable_prefix_caching=False,  # Its entries would outlive the weights that made them.
            disable_log_stats=True,
            seed=0,
            **place,
        )

    @contextmanager
    def mode(self) -> Iterator[Any]:
        """Within this context vLLM has the engine's present weights, adapters merged; afterwards it sleeps."""
        if self.on_gpu:
            self.llm.wake_up()
        partitioned = is_partitioned(self.engine)
        weights = plain_weights(self.engine.module, gather=partial(whole_parameters, self.engine), own=partitioned)
        try:
            with closing(weights):  # Whatever happens: what it holds of the engine goes back.
                self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            yield self.llm
        finally:
            if self.on_gpu:
                self.llm.sleep(level=2)

    def generate(self, prompts: PromptBatch, *, seed: int, streams: Int[Tensor, " B"]) -> Rollout:
        """Answer prompts, within `mode`."""
        pad_id = int(self.tokenizer.pad_token_id)
        return answer_together(prompts, streams, partial(self._answer, seed=seed), group=self.group, pad_id=pad_id)

    def release(self) -> None:
        """Give all memory back."""
        self.llm = None

    def _answer(self, rows: list[Int[Tensor, " _"]], streams: Int[Tensor, " n"], *, seed: int) -> list[Response]:
        options = parameters(self.sampling, limit=self.vocab_limit, vocab_size=self.engine.module.config.vocab_size)
        keys = (stream_keys(streams.cpu(), seed=seed) & 0x7FFFFFFF).tolist()
        inputs = [{"prompt_token_ids": row.tolist()} for row in rows]
        with kept_random_state():
            outputs = self.llm.generate(inputs, [self._parameters(seed=key, **options) for key in keys], use_tqdm=False)
        return [self._response(output.outputs[0]) for output in outputs]

    def _response(self, completion: Any) -> Response:
        ids = list(completion.token_ids)
        cut = end_of_text(self.tokenizer, self.sampling.stop, ids)
        ids = ids[:cut]
        logprobs = [entry[token].logprob for token, entry in zip(ids, completion.logprobs, strict=False)]
        return Response(
            ids=torch.tensor(ids, dtype=torch.long),
            # Those of a part of the distribution are not what training computes.
            logprobs=torch.tensor(logprobs, dtype=torch.float32) if self.sampling.unbiased else None,
            ended=cut is not None or completion.finish_reason == "stop",
        )


def parameters(sampling: Sampling, *, limit: int, vocab_size: int) -> dict[str, Any]:
    """The arguments of vLLM's SamplingParams, without the seed. Ids from `limit` on are never sampled."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "max_tokens": sampling.max_new_tokens,
        "min_tokens": sampling.min_new_tokens,
        "stop_token_ids": [stop_id for stop_id in sampling.stop_ids if stop_id < limit],
        "ignore_eos": True,  # What ends a response is among the stop tokens.
        "allowed_token_ids": list(range(limit)) if limit < vocab_size else None,
        "logprobs": 0,
        # So that nothing is drawn behind a text that ends a response; where exactly it ends is looked at afterwards.
        "stop": list(sampling.stop),
        "detokenize": bool(sampling.stop),
        "skip_special_tokens": False,
    }


@contextmanager
def _own_threads() -> Iterator[None]:
    """vLLM's CPU worker sets torch's threads and then keeps everyone from setting them: neither stays."""
    setter, count = torch.set_num_threads, torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads = setter
        setter(count)
