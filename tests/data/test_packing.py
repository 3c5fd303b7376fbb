"""Packed examples: the same tokens, targets, losses and gradients as padded ones."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, OPTConfig, Qwen2Config, Qwen3Config

from rlhf.data.collate import collate_sft
from rlhf.data.packing import assign_rows, pack
from rlhf.functional.masking import block_causal_bias
from rlhf.planner.architecture import PACKABLE
from rlhf.rollout.forward import next_token_loss

SIZES: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
CONFIGS = {
    "opt": OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64, dropout=0.0),
    "llama": LlamaConfig(**GATED),
    "qwen2": Qwen2Config(**GATED),
    "qwen3": Qwen3Config(**GATED, head_dim=8),
    "gpt_neox": GPTNeoXConfig(**SIZES, intermediate_size=64, max_position_embeddings=64),
}


def rows(lengths: list[tuple[int, int]], *, seed: int = 0) -> list[dict[str, Any]]:
    """Examples with prompts and answers of these lengths."""
    random = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(3, 97, (count,), generator=random).tolist()

    return [{"prompt_ids": ids(prompt), "chosen_ids": ids(answer)} for prompt, answer in lengths]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60))
def test_rows_hold_every_example_once_and_waste_less_than_padding(lengths: list[int]) -> None:
    width = max(lengths)
    found = assign_rows(lengths, width=width)
    assert sorted(index for row in found for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= width for row in found)
    # First-fit leaves at most one row that is not more than half full.
    assert sum(2 * sum(lengths[index] for index in row) <= width for row in found) <= 1


def test_packing_keeps_tokens_and_targets() -> None:
    batch = collate_sft(rows([(3, 9), (2, 2), (1, 4), (0, 3)]), pad_id=0)
    packed = pack(batch, pad_id=0)
    assert packed.sequence_ids.shape == (2, 12)
    assert sorted(packed.sequence_ids[packed.segment_ids > 0].tolist()) == sorted(
        batch.sequence_ids[batch.attention_mask].tolist()
    )
    # The first token of the example without a prompt has nothing that it could be predicted from.
    assert int(packed.loss_mask.sum()) == int(batch.loss_mask[:, 1:].sum()) == 9 + 2 + 4 + 2
    starts = packed.position_ids[packed.segment_ids > 0] == 0
    assert int(starts.sum()) == 4


def test_a_token_sees_its_own_example_up_to_itself() -> None:
    segments = torch.tensor([[1, 1, 2, 2, 0]])
    seen = block_causal_bias(segments, dtype=torch.float32)[0, 0] == 0
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
    assert seen.int().tolist() == expected


class Engine:
    """What `next_token_loss` needs of an engine: the model itself."""

    def __init__(self, model: Any) -> None:
        self.module = model

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)


@pytest.mark.parametrize("family", PACKABLE)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_losses_and_gradients_are_those_of_padded_rows(family: str, attention: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family], attn_implementation=attention).float().train()
    batch = collate_sft(rows([(5, 20), (3, 4), (2, 9), (6, 3), (1, 1), (4, 12)]), pad_id=0)
    packed = pack(batch, pad_id=0)
    assert len(packed) < len(batch)
    results = []
    for one in (batch, packed):
        model.zero_grad()
        loss = next_token_loss(Engine(model), one, vocab_limit=97)
        loss.backward()
        results.append(
            (loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        )
    (padded_loss, padded), (packed_loss, found) = results
    torch.testing.assert_close(packed_loss, padded_loss, rtol=1e-5, atol=1e-4)
    for name, gradient in padded.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
