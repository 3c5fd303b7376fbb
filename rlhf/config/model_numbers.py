"""The numbers in a model's config.json: whether a library may build what they say, and whether the weights agree."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from rlhf.config.model_files import StoredTensor, kind_of

# Beyond any model there is, and small enough that nothing of that size fills a memory by itself.
_SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "n_embed", "d_model", "word_embed_proj_dim"), 2**18),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2**12),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers", "num_nextn_predict_layers"), 2**12),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_key_value_heads", "head_dim"), 2**14),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 2**14),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner"), 2**22),
    **dict.fromkeys(("num_labels",), 2**16),  # transformers makes a name for each.
    **dict.fromkeys(("vocab_size",), 2**24),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "seq_length"), 2**30),
}
_FROM_ZERO = ("layer", "expert")  # There are models without.
_ENDLESS = ("time_step_limit",)  # Mamba's has Infinity.
# Those whose tensors are known well enough to be held against config.json.
_KNOWN = ("opt", "llama", "qwen2", "qwen3", "gpt_neox", "bloom")
_LAYER = re.compile(r"\.(?:layers|h)\.(\d{1,9})\.")
_EMBEDDINGS = ("embed_tokens.weight", "embed_in.weight", "word_embeddings.weight")
# What the rows of tensors are the product of. A field that config.json leaves out has another default in each family.
_ROWS = {
    "self_attn.k_proj.weight": ("num_key_value_heads", "head_dim"),
    "mlp.up_proj.weight": ("intermediate_size",),
    "fc1.weight": ("ffn_dim",),
    "mlp.dense_h_to_4h.weight": ("intermediate_size",),
}


def is_int(value: Any) -> bool:
    """Whether a value is a whole number; a Boolean is an int, too."""
    return type(value) is int


def size_faults(entries: Mapping[str, Any], *, where: str = "") -> Iterator[str]:
    """Sizes, those of parts (text_config) included, that are no whole numbers or beyond any model there is."""
    for name, limit in _SIZES.items():
        value = entries.get(name)
        if value is None:
            continue
        if not is_int(value):
            yield f"{where}{name} is {kind_of(value)}; it must be a whole number"
        elif not (0 if any(part in name for part in _FROM_ZERO) else 1) <= value <= limit:
            yield f"{where}{name}={_shown(value)}; it must be from 1 to {limit:,}"
    if not where:
        for name, part in entries.items():
            if name.endswith("_config") and name != "quantization_config" and isinstance(part, dict):
                yield from size_faults(part, where=f"{name}.")


def finite_faults(value: Any, where: str = "") -> Iterator[str]:
    """Numbers that are none, such as NaN, which Python's JSON reads and writes; the first of each list."""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{where} is {value}; it must be a finite number"
    elif isinstance(value, dict):
        for name, entry in value.items():
            if name not in _ENDLESS:
                yield from finite_faults(entry, f"{where}.{name}" if where else str(name))
    elif isinstance(value, list):
        yield from next((found for one in value if (found := list(finite_faults(one, where)))), [])


def head_faults(entries: Mapping[str, Any]) -> Iterator[str]:
    """Numbers of heads that do not divide what they share; the sizes have no faults."""

    def first(*names: str) -> int | None:
        return next((entries[name] for name in names if entries.get(name) is not None), None)

    hidden, heads = first("hidden_size", "n_embd", "n_embed", "d_model"), first("num_attention_heads", "n_head")
    groups = first("num_key_value_heads")
    if hidden and heads and not entries.get("head_dim") and hidden % heads:
        yield f"num_attention_heads={heads} does not divide hidden_size={hidden}"
    if heads and groups and heads % groups:
        yield f"num_key_value_heads={groups} does not divide num_attention_heads={heads}"


def shape_faults(entries: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Iterator[str]:
    """What the sizes say otherwise than the weights; the sizes have no faults."""
    vocab, hidden = entries.get("vocab_size"), entries.get("hidden_size")
    if entries.get("model_type") not in _KNOWN or entries.get("quantization_config") is not None:
        if hidden and vocab and hidden * vocab > 16 * sum(tensor.elements for tensor in tensors.values()):
            yield f"hidden_size={hidden} and vocab_size={vocab} make more weights than there are"
        return
    numbers = [int(match.group(1)) for name in tensors for match in _LAYER.finditer(name)]
    layers = 1 + max(numbers, default=-1)
    stated = entries.get("num_hidden_layers", entries.get("n_layer"))
    if stated is not None and layers and stated != layers:
        yield f"num_hidden_layers={stated}, but the weights have {layers} layers"
    embedding = next((one for name, one in tensors.items() if name.endswith(_EMBEDDINGS)), None)
    if embedding is not None and len(embedding.shape) == 2:
        width = entries.get("word_embed_proj_dim") or hidden
        for name, value, stored in zip(("vocab_size", "hidden_size"), (vocab, width), embedding.shape, strict=True):
            if value is not None and value != stored:
                yield f"{name}={value}, but the embedding's weights have {stored}"
    yield from _row_faults(entries, tensors)


def _row_faults(entries: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Iterator[str]:
    for ending, fields in _ROWS.items():
        values = [entries.get(name) for name in fields]
        found = next(((name, one) for name, one in tensors.items() if name.endswith(f".{ending}")), None)
        if found is None or not all(values) or len(found[1].shape) != 2:
            continue
        rows = math.prod(value for value in values if value)
        if rows != found[1].shape[0]:
            stated = " and ".join(f"{name}={value}" for name, value in zip(fields, values, strict=True))
            yield f"{stated} make{'s' if len(fields) == 1 else ''} {rows} rows, but {found[0]} has {found[1].shape[0]}"


def _shown(value: int) -> str:
    """A number that may have thousands of digits."""
    return str(value) if abs(value) < 10**24 else "a number of more than 24 digits"
