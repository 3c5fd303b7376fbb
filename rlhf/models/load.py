"""Models from Hugging Face directories: causal language models and models with a scalar head."""

import json
import math
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf.config.errors import ConfigError
from rlhf.models.door import load_config, load_model
from rlhf.models.head import make_answerable
from rlhf.models.template import response_ends

SAMPLING_DEFAULTS = "sampling_defaults.json"


def load_causal_lm(
    directory: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype,
    attention: str,
    revision: str | None = None,
) -> PreTrainedModel:
    """Load a causal language model; its BOS and PAD are the tokenizer's, and what ends its answers is known.

    Sampling defaults that it carries in generation_config.json, such as top_k, are kept apart: what is sampled is what
    the run's configuration says.
    """
    model = load_model(AutoModelForCausalLM, directory, revision=revision, dtype=dtype, attn_implementation=attention)
    fit_embedding(model, tokenizer)
    vars(model)["sampling_defaults"] = sampling_defaults(model, Path(directory))
    set_special_tokens(model, tokenizer)
    make_answerable(model)
    return cast(PreTrainedModel, model)


def fit_embedding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the embedding a row for every token: a padding token that was added to a tokenizer may lie beyond it."""
    if len(tokenizer) > int(model.config.get_text_config().vocab_size):
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)


def set_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the model's configuration and generation defaults the tokenizer's BOS and PAD, and all that ends a response.

    That is the model's own list, the tokenizer's EOS and the end that the chat template writes (`answer_ends`).
    """
    ends = response_ends(tokenizer, _own_ends(model))
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": ends[0] if len(ends) == 1 else list(ends),
        "pad_token_id": tokenizer.pad_token_id,
    }
    for name, value in ids.items():
        setattr(model.config, name, value)
    model.generation_config = GenerationConfig(**ids)


def _own_ends(model: PreTrainedModel) -> Any:
    """What generation_config.json says; a list in config.json. A single id there may be no more than a class's default.

    So may be what transformers writes into a generation_config.json that it makes from a config.json.
    """
    config = getattr(model, "generation_config", None)
    if config is not None and config.eos_token_id is not None and not config._from_model_config:
        return config.eos_token_id
    own = getattr(model.config, "eos_token_id", None)
    return own if isinstance(own, list) else None


def answer_ends(model: PreTrainedModel) -> tuple[int, ...]:
    """The ids of the tokens that end a response of a model that `load_causal_lm` has loaded."""
    ends = model.generation_config.eos_token_id
    return tuple(ends) if isinstance(ends, list) else (int(ends),)


def sampling_defaults(model: PreTrainedModel, directory: Path) -> dict[str, Any]:
    """How a model's makers would have it sampled: what was kept apart before, else generation_config.json's settings.

    Raises:
        ConfigError: the file cannot be read.
    """
    kept = directory / SAMPLING_DEFAULTS
    if kept.is_file():
        try:
            found = json.loads(kept.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{kept} cannot be read: {error}") from error
        return found if isinstance(found, dict) else {}
    config = model.generation_config
    if config._from_model_config:
        return {}
    settings = config.to_diff_dict()
    return {
        key: value
        for key, value in settings.items()
        if not key.startswith("_") and not key.endswith("_token_id") and key != "transformers_version"
    }


class Float32Linear(nn.Linear):
    """A linear layer that multiplies in fp32 whatever the format of its weights: scores differ by little."""

    def forward(self, input: Tensor) -> Tensor:
        """[…, in] of any floating format to [..., out] in fp32."""
        bias = self.bias.float() if self.bias is not None else None
        return F.linear(input.float(), self.weight.float(), bias)


class ScalarModel(nn.Module):
    """A transformer with one number per token: a value function, or a reward model read at the last token.

    It wraps a sequence classifier of transformers with one label, so that what it learned is saved as a directory
    that `AutoModelForSequenceClassification` loads.
    """

    prefix = "classifier."

    def __init__(self, classifier: PreTrainedModel) -> None:
        super().__init__()
        self.classifier = classifier
        classifier.score.__class__ = Float32Linear  # Same parameters, same hooks; only the arithmetic is fp32.

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        attention_mask: Bool[Tensor, "B T"],
        position_ids: Int[Tensor, "B T"],
    ) -> Float[Tensor, "B T"]:
        """The scalar of every position, fp32."""
        output: Any = self.classifier.base_model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        )
        scalars: Tensor = cast(nn.Module, self.classifier.score)(output.last_hidden_state)
        return scalars.squeeze(-1)


def load_scalar_model(
    directory: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype,
    attention: str,
    revision: str | None = None,
) -> ScalarModel:
    """Load a model with a scalar head from a trained reward model, or from a language model (the head is then new).

    Raises:
        ConfigError: the architecture has no sequence classifier with a `score` head in transformers.
    """
    config = load_config(directory, revision=revision, num_labels=1)
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise ConfigError(f"{directory}: transformers has no sequence classifier for {config.model_type}")
    model = load_model(
        AutoModelForSequenceClassification,
        directory,
        may_lack=() if _classifies(config) else ("score.weight",),
        revision=revision,
        config=config,
        dtype=dtype,
        attn_implementation=attention,
    )
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise ConfigError(
            f"{directory}: the sequence classifier of {config.model_type} has no linear head named 'score'"
        )
    fit_embedding(model, tokenizer)
    set_special_tokens(model, tokenizer)
    return ScalarModel(model)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability of a model to 0, also those that transformers keeps as plain numbers."""
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for name, value in vars(part).items():
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)


def set_dropout(model: nn.Module, probability: float, *, key: str) -> None:
    """Give every dropout of a model one probability, whatever its configuration says. Before adapters are added.

    The configuration, which is exported with the model, stays as it is: what is trained from the export has its own
    dropout. Layers that are dropped whole (OPT's layerdrop) are another thing and left alone.

    Raises:
        ConfigError: the model has no dropout, so that the option `key` would do nothing.
    """
    found = False
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p, found = probability, True
        for name, value in vars(part).items():
            if ("dropout" in name or "pdrop" in name) and type(value) in (int, float):
                setattr(part, name, probability)
                found = True
    if not found:
        raise ConfigError(f"{key}={probability:g}: {type(model).__name__} has no dropout; leave {key} out")


def has_scalar_head(directory: Path) -> bool:
    """Whether a model directory holds a trained sequence classifier."""
    return _classifies(load_config(directory))


def _classifies(config: PreTrainedConfig) -> bool:
    return any("SequenceClassification" in name for name in config.architectures or [])


def initialize_head_weight(weight: Tensor, *, seed: int) -> None:
    """Draw the head's weights from N(0, 1/sqrt(d+1)) (Stiennon et al. 2020), the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(weight.shape, generator=generator) / math.sqrt(weight.shape[-1] + 1)
    with torch.no_grad():
        weight.copy_(values)


def vocabulary_limit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many of the model's logits name tokens; the rest is padding of the embedding and never sampled."""
    return min(len(tokenizer), int(model.config.vocab_size))
