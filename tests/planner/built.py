"""What transformers builds from the sizes that planning knows, on a device without memory."""

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomConfig,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from rlhf.config.schema import ArchitectureConfig
from rlhf.planner.parameters import Head

GATED = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
# Small sizes of every family, all different, with what is special in each: OPT-350M's narrow embedding, few key heads.
SMALL = {
    "opt": ArchitectureConfig(
        family="opt",
        num_layers=2,
        hidden_size=48,
        num_heads=4,
        intermediate_size=80,
        vocab_size=97,
        max_positions=33,
        embedding_size=24,
        final_norm=False,
    ),
    "bloom": ArchitectureConfig(
        family="bloom",
        num_layers=3,
        hidden_size=32,
        num_heads=4,
        intermediate_size=128,
        vocab_size=96,
        max_positions=2048,
    ),
    "gpt_neox": ArchitectureConfig(
        family="gpt_neox",
        num_layers=2,
        hidden_size=40,
        num_heads=5,
        intermediate_size=88,
        vocab_size=70,
        max_positions=64,
        tied_embeddings=False,
    ),
    "llama": ArchitectureConfig(
        family="llama",
        num_layers=2,
        hidden_size=48,
        num_heads=6,
        num_kv_heads=2,
        intermediate_size=56,
        vocab_size=90,
        max_positions=128,
    ),
    "qwen2": ArchitectureConfig(
        family="qwen2",
        num_layers=2,
        hidden_size=48,
        num_heads=6,
        num_kv_heads=3,
        intermediate_size=72,
        vocab_size=91,
        max_positions=256,
        tied_embeddings=False,
    ),
    "qwen3": ArchitectureConfig(
        family="qwen3",
        num_layers=2,
        hidden_size=48,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=64,
        vocab_size=92,
        max_positions=512,
    ),
}


def transformers_config(sizes: ArchitectureConfig) -> PretrainedConfig:
    """The configuration of a family's own class."""
    common: dict[str, Any] = {
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "tie_word_embeddings": sizes.tied_embeddings,
        "num_labels": 1,
        "pad_token_id": 1,
    }
    if sizes.family == "bloom":
        assert sizes.intermediate_size == 4 * sizes.hidden_size, "BLOOM has no other width"
        return BloomConfig(n_layer=sizes.num_layers, n_head=sizes.num_heads, **common)
    common |= {
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "max_position_embeddings": sizes.max_positions,
    }
    if sizes.family == "opt":
        return OPTConfig(
            ffn_dim=sizes.intermediate_size,
            word_embed_proj_dim=sizes.embedding_size or sizes.hidden_size,
            do_layer_norm_before=sizes.final_norm,
            **common,
        )
    common["intermediate_size"] = sizes.intermediate_size
    if sizes.family == "gpt_neox":
        return GPTNeoXConfig(**common)
    assert sizes.family is not None
    head_dim = {} if sizes.head_dim is None else {"head_dim": sizes.head_dim}
    return GATED[sizes.family](num_key_value_heads=sizes.num_kv_heads or sizes.num_heads, **head_dim, **common)


def built(sizes: ArchitectureConfig, head: Head) -> PreTrainedModel:
    """The model on the meta device."""
    auto = AutoModelForCausalLM if head is Head.lm else AutoModelForSequenceClassification
    with torch.device("meta"):
        return auto.from_config(transformers_config(sizes))


def count(model: PreTrainedModel, *, trainable: bool = False) -> int:
    """Parameters; tied weights once."""
    return sum(each.numel() for each in model.parameters() if each.requires_grad or not trainable)
