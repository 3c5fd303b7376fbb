"""Parameter counts from sizes alone, equal to what transformers builds."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from rlhf.config.schema import ArchitectureConfig


class Head(Enum):
    """What a model ends in: next-token logits, or one number."""

    lm = "lm"
    scalar = "scalar"


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer of a block: its name in transformers, inputs, outputs, and whether it has a bias."""

    name: str
    inputs: int
    outputs: int
    bias: bool

    @property
    def parameters(self) -> int:
        """Weights and bias."""
        return self.inputs * self.outputs + (self.outputs if self.bias else 0)


def block_linears(sizes: ArchitectureConfig) -> list[Linear]:
    """The linear layers of one transformer block."""
    h, f = sizes.hidden_size, sizes.intermediate_size
    if sizes.family == "opt":
        attention = [Linear(name, h, h, True) for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
        return [*attention, Linear("fc1", h, f, True), Linear("fc2", f, h, True)]
    if sizes.family in ("gpt_neox", "bloom"):
        shapes = {"query_key_value": (h, 3 * h), "dense": (h, h), "dense_h_to_4h": (h, f), "dense_4h_to_h": (f, h)}
        return [Linear(name, *shape, True) for name, shape in shapes.items()]
    head_dim = sizes.head_dim or h // sizes.num_heads
    queries, keys = sizes.num_heads * head_dim, (sizes.num_kv_heads or sizes.num_heads) * head_dim
    bias = sizes.family == "qwen2"
    attention = [Linear("q_proj", h, queries, bias), Linear("k_proj", h, keys, bias), Linear("v_proj", h, keys, bias)]
    gated = [Linear("gate_proj", h, f, False), Linear("up_proj", h, f, False), Linear("down_proj", f, h, False)]
    return [*attention, Linear("o_proj", queries, h, False), *gated]


def block_parameters(sizes: ArchitectureConfig) -> int:
    """Parameters of one transformer block, norms included."""
    h = sizes.hidden_size
    norms = 4 * h if sizes.family in ("opt", "gpt_neox", "bloom") else 2 * h
    if sizes.family == "qwen3":
        norms += 2 * (sizes.head_dim or h // sizes.num_heads)
    return sum(layer.parameters for layer in block_linears(sizes)) + norms


def embedding_parameters(sizes: ArchitectureConfig) -> int:
    """Token embedding, learned positions, what projects between their width and the blocks', and their norm."""
    h = sizes.hidden_size
    width = sizes.embedding_size or h
    found = sizes.vocab_size * width
    if sizes.family == "opt":
        found += (sizes.max_positions + 2) * h + (2 * width * h if width != h else 0)
    return found + (2 * h if sizes.family == "bloom" else 0)


def parameter_count(sizes: ArchitectureConfig, *, head: Head = Head.lm) -> int:
    """All parameters of a model with the given head; a tied output layer counts once."""
    h = sizes.hidden_size
    final_norm = (2 * h if sizes.family in ("opt", "gpt_neox", "bloom") else h) if sizes.final_norm else 0
    body = embedding_parameters(sizes) + sizes.num_layers * block_parameters(sizes) + final_norm
    if head is Head.scalar:
        return body + scalar_head_parameters(sizes)
    return body + (0 if sizes.tied_embeddings else sizes.vocab_size * (sizes.embedding_size or h))


def scalar_head_parameters(sizes: ArchitectureConfig) -> int:
    """The weights that make one number of a token's last hidden state."""
    return sizes.embedding_size or sizes.hidden_size


def lora_parameter_count(sizes: ArchitectureConfig, *, rank: int, targets: Sequence[str]) -> int:
    """Parameters of the adapters: rank × (inputs + outputs) for each adapted layer."""
    adapted = [layer for layer in block_linears(sizes) if layer.name in targets]
    return sizes.num_layers * sum(rank * (layer.inputs + layer.outputs) for layer in adapted)


def norm_and_embedding_parameters(sizes: ArchitectureConfig, *, head: Head = Head.lm) -> int:
    """What `lora.only_lora=false` trains beside the adapters: norms, embeddings, and an output layer of its own."""
    h, width = sizes.hidden_size, sizes.embedding_size or sizes.hidden_size
    linears = sizes.num_layers * sum(layer.parameters for layer in block_linears(sizes))
    projections = 2 * width * h if sizes.family == "opt" and width != h else 0
    scalar = scalar_head_parameters(sizes) if head is Head.scalar else 0
    return parameter_count(sizes, head=head) - linears - projections - scalar
