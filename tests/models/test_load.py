"""Scalar heads and dropout."""

import math
import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from rlhf.config.errors import ConfigError
from rlhf.config.schema import ModelConfig, ScratchConfig, WeightSource
from rlhf.engine.export import export_adapter
from rlhf.models.load import (
    disable_dropout,
    has_scalar_head,
    initialize_head_weight,
    load_causal_lm,
    load_scalar_model,
    set_dropout,
    vocabulary_limit,
)
from rlhf.models.lora import add_adapters
from rlhf.models.prepare import prepare_base_model
from rlhf.models.tokenizer import ADDED_PAD, complete_tokenizer


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


SIZES = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
FAMILIES = {
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16, "dropout": 0.3, "layerdrop": 0.0},
    "llama": {"intermediate_size": 32, "attention_dropout": 0},
    "qwen2": {"intermediate_size": 32, "num_key_value_heads": 1},
    "qwen3": {"intermediate_size": 32, "head_dim": 8, "num_key_value_heads": 2},
    "gpt_neox": {"intermediate_size": 32},
    "bloom": {"hidden_dropout": 0.1},
    "gpt2": {},
    "phi": {"intermediate_size": 32},
}


@pytest.mark.parametrize(
    ("family", "attention"), [(name, "eager") for name in FAMILIES] + [("opt", "sdpa"), ("llama", "sdpa")]
)
def test_a_dropout_replaces_the_configurations_in_every_family(family: str, attention: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    stated = model.config.to_dict()
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])

    def logits(training: bool) -> torch.Tensor:
        torch.manual_seed(1)
        with torch.no_grad():
            found: torch.Tensor = model.train(training)(ids).logits
        return found

    expected = logits(False)
    set_dropout(model, 0.0, key="stage.dropout")
    torch.testing.assert_close(logits(True), expected)
    set_dropout(model, 0.3, key="stage.dropout")
    trained = logits(True)
    assert not torch.allclose(trained, expected)
    torch.testing.assert_close(logits(True), trained)  # Of the same random numbers.
    torch.testing.assert_close(logits(False), expected)
    set_dropout(model, 0.6, key="stage.dropout")
    assert not torch.allclose(logits(True), trained)
    assert model.config.to_dict() == stated
    assert all(part.p == 0.6 for part in model.modules() if isinstance(part, nn.Dropout))
    assert getattr(model.get_decoder(), "layerdrop", 0.0) == 0.0


def test_dropout_of_a_model_that_has_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"stage\.sft\.dropout=0\.1: Linear has no dropout"):
        set_dropout(nn.Linear(2, 2), 0.1, key="stage.sft.dropout")


def test_an_added_padding_token_gets_a_row(directory: Path, tmp_path: Path) -> None:
    """GPT-2's and Llama 3's tokenizers have no padding token, and no room for one in the embedding."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=22, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=20, eos_token_id=21)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    words = {f"w{index}": index for index in range(20)} | {"<s>": 20, "</s>": 21}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), bos_token="<s>", eos_token="</s>"
    )
    assert complete_tokenizer(tokenizer, chat_template="{{ messages[0]['content'] }}")
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == (ADDED_PAD, 22)
    policy = load_causal_lm(tmp_path, tokenizer, dtype=torch.float32, attention="eager").eval()
    scorer = load_scalar_model(tmp_path, tokenizer, dtype=torch.float32, attention="eager").eval()
    assert vocabulary_limit(policy, tokenizer) == 23
    ids, mask = torch.tensor([[22, 22, 1, 2]]), torch.tensor([[False, False, True, True]])
    places = torch.tensor([[0, 0, 0, 1]])
    with torch.no_grad():
        padded = policy(input_ids=ids, attention_mask=mask, position_ids=places).logits[0, 2:]
        alone = policy(input_ids=ids[:, 2:]).logits[0]
        values = scorer(input_ids=ids, attention_mask=mask, position_ids=places)
    torch.testing.assert_close(padded, alone)
    assert torch.isfinite(values).all()


def test_exported_adapters_and_new_models_are_readable_by_those_whom_the_umask_allows(
    directory: Path, tmp_path: Path
) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    model = load_causal_lm(directory, tokenizer, dtype=torch.float32, attention="eager")
    add_adapters(model, rank=2, alpha=4.0, dropout=0.0, targets=["q_proj"], seed=0)
    before = os.umask(0o022)
    try:
        export_adapter(model, dict(model.state_dict()), tmp_path / "adapter")
        scratch = ScratchConfig(vocab_size=24, num_layers=1, hidden_size=8, num_heads=2, intermediate_size=8)
        new = ModelConfig(name="new", source=WeightSource.scratch, scratch=scratch)
        base = Path(prepare_base_model(new, tokenizer, cache_dir=tmp_path, seed=0))
    finally:
        os.umask(before)
    for folder in (tmp_path / "adapter", base):
        assert folder.stat().st_mode & 0o777 == 0o755
        modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
        assert any(name.endswith(".safetensors") for name in modes) and set(modes.values()) == {0o644}, modes
