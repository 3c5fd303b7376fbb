"""Models of a few thousand parameters with their tokenizers, which all tests here share."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import OPTConfig, OPTForCausalLM, OPTForSequenceClassification, PreTrainedTokenizerFast

from rlhf.models.score_rule import write_score_rule


def make_models(folder: Path) -> None:
    """A policy and a reward model of a few thousand parameters, with dropout in their configuration."""
    words = ["<s>", "</s>", "<pad>", "<unk>", "<|user|>", "<|assistant|>", *(f"w{index}" for index in range(42))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=len(words) + 4,  # Four rows of padding: they must never be sampled.
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=64,
        word_embed_proj_dim=32,
        max_position_embeddings=64,
        dropout=0.1,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        init_std=0.2,
    )
    OPTForCausalLM(OPTConfig(**sizes)).save_pretrained(folder / "policy")
    reward = OPTForSequenceClassification(OPTConfig(num_labels=1, **sizes))
    reward.save_pretrained(folder / "reward")
    for name in ("policy", "reward"):
        tokenizer.save_pretrained(folder / name)
    write_score_rule(folder / "reward", tokenizer, mean=0.25, std=1.5)
    make_other_reward_model(folder / "other_reward", words, sizes)


def make_other_reward_model(folder: Path, words: list[str], sizes: dict[str, Any]) -> None:
    """A reward model whose tokenizer has the same words under other ids, and another chat template."""
    shuffled = [*words[:4], *reversed(words[4:])]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(shuffled)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|> ' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ ' <|assistant|> ' }}{% endif %}"
    )
    OPTForSequenceClassification(OPTConfig(num_labels=1, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
