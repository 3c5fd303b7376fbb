"""Base models as directories on disk: pretrained ones as they are, new and packaged ones built once and cached."""

import hashlib
import importlib.util
import json
from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch
from filelock import FileLock
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf.config.errors import ConfigError, MissingExtraError
from rlhf.config.schema import ModelConfig, ScratchConfig, WeightSource
from rlhf.config.writing import whole_directory


def prepare_base_model(model: ModelConfig, tokenizer: PreTrainedTokenizerBase, *, cache_dir: Path, seed: int) -> str:
    """Return what `from_pretrained` takes for a base model: a directory, or a name on the hub.

    New models (source=scratch) and packaged ones (source=gguf_package) are built into the cache by whichever process
    comes first; the others wait for it.

    Args:
        model: which model.
        tokenizer: its tokenizer; a new model's embedding gets its special-token ids.
        cache_dir: where built models are kept.
        seed: of the initial weights of a new model.

    Raises:
        ConfigError: no path for a pretrained model, or a package that is not installed.
    """
    if model.source is WeightSource.pretrained:
        if model.path is None:
            raise ConfigError(
                "model.path is not set: give a directory or ORG/NAME, as in  model=hf model.path=ORG/NAME"
            )
        return model.path
    facts = {"model": asdict(model), "seed": seed, "vocabulary": tokenizer.get_vocab(), "format": 1}
    key = hashlib.blake2b(json.dumps(facts, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()
    directory = cache_dir / "models" / f"{model.name}-base-{key}"
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{directory}.lock"):
        if not (directory / "config.json").is_file():
            built = _create(model.scratch, tokenizer, seed) if model.source is WeightSource.scratch else _unpack(model)
            _save(built, tokenizer, directory)
    return str(directory)


def _create(scratch: ScratchConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    sizes = {
        "vocab_size": scratch.vocab_size,
        "num_hidden_layers": scratch.num_layers,
        "hidden_size": scratch.hidden_size,
        "num_attention_heads": scratch.num_heads,
        "max_position_embeddings": scratch.max_positions,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if scratch.architecture == "opt":
        # OPT's names of the same things, and no dropout: a small model on little data trains one or two epochs.
        sizes |= {"ffn_dim": scratch.intermediate_size, "word_embed_proj_dim": scratch.hidden_size, "dropout": 0.0}
    else:
        sizes |= {"intermediate_size": scratch.intermediate_size}
    config = AutoConfig.for_model(scratch.architecture, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        created: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return created


def _unpack(model: ModelConfig) -> PreTrainedModel:
    """Load the GGUF file of a package, de-quantised, and rebuild it from a clean configuration.

    transformers keeps a quantization_config on models read from GGUF, which would forbid saving them.
    """
    assert model.package is not None and model.gguf_file is not None
    found = importlib.util.find_spec(model.package)
    if found is None or not found.submodule_search_locations:
        raise MissingExtraError(model.package, model.extra or model.name, f"model={model.name}")
    folder = found.submodule_search_locations[0]
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=model.gguf_file, dtype=torch.float32)
    entries = loaded.config.to_dict()
    entries.pop("quantization_config", None)
    clean: PreTrainedConfig = type(loaded.config)(**entries)
    plain: PreTrainedModel = AutoModelForCausalLM.from_config(clean)
    plain.load_state_dict({name: value.float() for name, value in loaded.state_dict().items()})
    return cast(PreTrainedModel, cast(nn.Module, plain).to(torch.bfloat16))


def _save(built: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    with whole_directory(directory) as partial:
        built.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
