"""Scalar heads and dropout."""

import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from rlhf.models.load import disable_dropout, has_scalar_head, initialize_head_weight, load_scalar_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 32, "vocab_size": 24}
    OPTForCausalLM(
        OPTConfig(word_embed_proj_dim=16, max_position_embeddings=32, dropout=0.3, attention_dropout=0.2, **sizes)
    ).save_pretrained(path)
    words = {f"w{index}": index for index in range(20)} | {"<s>": 20, "</s>": 21, "<pad>": 22, "<unk>": 23}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    ).save_pretrained(path)
    return path


def test_new_heads_are_drawn_as_stated_and_alike_on_every_rank() -> None:
    first, second = torch.zeros(1, 4095), torch.zeros(1, 4095)
    initialize_head_weight(first, seed=5)
    initialize_head_weight(second, seed=5)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert float(first.std()) == pytest.approx(1 / math.sqrt(4096), rel=0.05)
    assert abs(float(first.mean())) < 4 / 4096


def test_the_head_multiplies_in_fp32_and_padding_sides_agree(directory: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    model = load_scalar_model(directory, tokenizer, dtype=torch.bfloat16, attention="sdpa").eval()
    assert not has_scalar_head(directory)
    ids = torch.tensor([[1, 2, 3, 4]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        values = model(input_ids=ids, attention_mask=mask, position_ids=torch.arange(4).unsqueeze(0))
    assert values.dtype is torch.float32
    assert values.shape == (1, 4)
    rounded = values.bfloat16().float()
    assert not torch.equal(values, rounded)


def test_without_dropout_training_mode_computes_what_evaluation_does(directory: Path) -> None:
    model = OPTForCausalLM.from_pretrained(directory)
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    with torch.no_grad():
        expected = model.eval()(ids).logits
        assert not torch.equal(model.train()(ids).logits, expected)
        disable_dropout(model)
        torch.testing.assert_close(model.train()(ids).logits, expected)
    assert not any(isinstance(part, nn.Dropout) and part.p for part in model.modules())
