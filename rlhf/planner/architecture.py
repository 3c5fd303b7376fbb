"""What a configured model looks like, without loading it: from its YAML, its own sizes, or a config.json."""

from pathlib import Path
from typing import Any

from rlhf.config.model_files import ModelFileError, read_object
from rlhf.config.schema import ArchitectureConfig, ModelConfig, WeightSource

# transformers leaves out of a config.json what equals the class's default.
_TIED = {"opt": True, "bloom": True, "llama": False, "qwen2": False, "qwen3": False, "gpt_neox": False}
FAMILIES = tuple(_TIED)
# Those whose attention takes a bias for every pair of tokens. Bloom builds its own from a mask of single tokens.
PACKABLE = ("opt", "llama", "qwen2", "qwen3", "gpt_neox")
PACKING_ATTENTION = ("sdpa", "eager")


def architecture_of(model: ModelConfig) -> ArchitectureConfig | None:
    """The sizes of a model, or None if nothing here knows them."""
    if model.source is WeightSource.scratch:
        scratch = model.scratch
        if scratch.architecture not in FAMILIES:
            return None
        return ArchitectureConfig(
            family=scratch.architecture,
            num_layers=scratch.num_layers,
            hidden_size=scratch.hidden_size,
            num_heads=scratch.num_heads,
            intermediate_size=scratch.intermediate_size,
            vocab_size=scratch.vocab_size,
            max_positions=scratch.max_positions,
            tied_embeddings=_TIED[scratch.architecture],
        )
    if model.architecture.family is not None:
        return model.architecture
    return from_directory(Path(model.path)) if model.path is not None else None


def from_directory(directory: Path) -> ArchitectureConfig | None:
    """Read a model directory's config.json; None if there is none or its family is not known here."""
    try:
        entries = read_object(directory / "config.json")
    except ModelFileError:
        return None
    family = entries.get("model_type")
    if family not in FAMILIES:
        return None
    hidden_size = _number(entries, "hidden_size", "n_embed")
    layers, heads = _number(entries, "num_hidden_layers", "n_layer"), _number(entries, "num_attention_heads", "n_head")
    if not (hidden_size and layers and heads and _number(entries, "vocab_size")):
        return None
    return ArchitectureConfig(
        family=family,
        num_layers=layers,
        hidden_size=hidden_size,
        num_heads=heads,
        num_kv_heads=_number(entries, "num_key_value_heads") or None,
        head_dim=_number(entries, "head_dim") or None,
        intermediate_size=_number(entries, "intermediate_size", "ffn_dim") or 4 * hidden_size,
        vocab_size=_number(entries, "vocab_size"),
        max_positions=_number(entries, "max_position_embeddings", "seq_length") or 2048,
        tied_embeddings=bool(entries.get("tie_word_embeddings", _TIED[family])),
        embedding_size=_number(entries, "word_embed_proj_dim") or None,
        final_norm=bool(entries.get("do_layer_norm_before", True)),
    )


def _number(entries: dict[str, Any], *names: str) -> int:
    """A size, 0 if there is none or none that makes sense."""
    return next((value for name in names if type(value := entries.get(name)) is int and 0 < value < 2**31), 0)
