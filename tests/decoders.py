"""Miniature decoders of every family with random weights, and what they answer natively and by transformers."""

import copy
import ctypes
from contextlib import nullcontext
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GenerationConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rlhf.models.decoder.parts import decoder_parts
from rlhf.models.decoder.weights import DecoderWeights, generation_weights
from rlhf.rollout.native.arena import Arena
from rlhf.rollout.native.compiled import CompiledBlocks
from rlhf.rollout.native.forward import Decoder
from rlhf.rollout.native.graphs import StepGraphs
from rlhf.rollout.native.loop import Batch
from rlhf.rollout.responses import Response
from rlhf.rollout.sampling import Sampling

SIZE, EOS, PAD = 97, 1, 2
IDS: dict[str, Any] = {"vocab_size": SIZE, "bos_token_id": 0, "eos_token_id": EOS, "pad_token_id": PAD}
SMALL: dict[str, Any] = {
    **IDS,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
OPT = {name: value for name, value in SMALL.items() if name not in ("intermediate_size", "initializer_range")} | {
    "ffn_dim": 96,
    "init_std": 0.3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS: dict[str, tuple[Any, Any]] = {
    "opt": (OPTForCausalLM, OPTConfig(**OPT, word_embed_proj_dim=64)),
    "opt-350m": (OPTForCausalLM, OPTConfig(**OPT, word_embed_proj_dim=32, do_layer_norm_before=False)),
    "llama": (LlamaForCausalLM, LlamaConfig(**GROUPED, tie_word_embeddings=True)),
    "llama-3": (LlamaForCausalLM, LlamaConfig(**GROUPED, rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True)),
    "mistral": (MistralForCausalLM, MistralConfig(**GROUPED, sliding_window=None)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**GROUPED)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**GROUPED, head_dim=32)),
    "pythia": (GPTNeoXForCausalLM, GPTNeoXConfig(**SMALL, rotary_pct=0.25)),
    "gpt-neox": (GPTNeoXForCausalLM, GPTNeoXConfig(**SMALL, rotary_pct=0.5, use_parallel_residual=False)),
    "bloom": (BloomForCausalLM, BloomConfig(**IDS, hidden_size=60, n_layer=2, n_head=6, initializer_range=0.3)),
}
LENGTHS = (3, 17, 9, 1, 9, 12, 30, 2)


def model_of(name: str, seed: int = 0) -> Any:
    """A miniature model with random weights."""
    kind, config = MODELS[name]
    torch.manual_seed(seed)
    return kind(config).eval()


def adapt(model: Any, modules: list[str]) -> None:
    """Give a model adapters that change it."""
    inject_adapter_in_model(PeftLoraConfig(r=3, lora_alpha=7, target_modules=modules), model)
    for part, parameter in model.named_parameters():
        if "lora_B" in part:
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(len(part)))


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[torch.Tensor]:
    """Ragged prompts, without padding."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, SIZE, (length,), generator=generator) for length in lengths]


def weights_of(model: Any, *, vocab_limit: int = SIZE, own: bool = True, rows: int | None = 8) -> DecoderWeights:
    """The model's weights, copied or as they are."""
    parts = decoder_parts(model)
    return generation_weights(parts, vocab_limit=vocab_limit, rows=rows, gather=lambda part: nullcontext(), own=own)


def decoded(
    model: Any,
    rows: list[torch.Tensor],
    *,
    slots: int = 8,
    streams: torch.Tensor | None = None,
    own: bool = True,
    seed: int = 0,
    stops: Any = None,
    check_every: int = 1,
    graphs: StepGraphs | None = None,
    library: ctypes.CDLL | None = None,
    **options: Any,
) -> list[Response]:
    """Native responses, with a library by compiled blocks."""
    weights = weights_of(model, own=own, rows=8 if library is None else None)
    arena = Arena()
    settings = {"temperature": 0.0, "stop_ids": (EOS,), "max_new_tokens": 40} | options
    arena.fit(weights, slots=slots, length=max(map(len, rows)) + settings["max_new_tokens"])
    numbers = torch.arange(len(rows)) if streams is None else streams
    compiled = CompiledBlocks(library, weights, arena) if library is not None else None
    sampling, decoder = Sampling(**settings), Decoder(weights=weights, compiled=compiled)
    batch = Batch(decoder, arena, rows, numbers, sampling, seed=seed, stops=stops, graphs=graphs)
    batch.check_every = check_every
    return batch.run()


def expected(model: Any, rows: list[torch.Tensor], **options: Any) -> list[list[int]]:
    """The responses of transformers' generate, padded on the left."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :], mask[index, width - len(row) :] = row, 1
    settings = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": PAD, "eos_token_id": EOS} | options
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=GenerationConfig(**settings))
    responses = out[:, width:].tolist()
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in responses]


def tokens(responses: list[Response]) -> list[list[int]]:
    """The tokens alone."""
    return [response.ids.tolist() for response in responses]


def replace_range(config: Any) -> Any:
    """A copy of the configuration with weights of a usual size."""
    config = copy.deepcopy(config)
    for key in ("initializer_range", "init_std"):
        if hasattr(config, key):
            setattr(config, key, 0.02)
    return config
