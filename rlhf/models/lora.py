"""Low-rank adapters (Hu et al. 2021): h = W x + scale · B A x, of which only A and B are trained."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.config.errors import ConfigError

_A, _B, _BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer"


def add_adapters(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str],
    seed: int,
    only_lora: bool = True,
) -> None:
    """Put adapters around the named linear layers, in place; every other weight but a scalar head is frozen.

    Without `only_lora` norms, embeddings and the output layer are trained as well. B starts at zero, so the model
    computes what it did. The adapters have the format of the weights.

    Raises:
        ConfigError: no layer of the model has one of the names.
    """
    settings = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=list(targets),
        bias="none",
    )
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(settings, model)
        except ValueError as error:
            linear = sorted(
                {name.split(".")[-1] for name, part in model.named_modules() if isinstance(part, nn.Linear)}
            )
            raise ConfigError(
                f"lora.targets={list(targets)}: the model has no linear layer of that name; it has {', '.join(linear)}"
            ) from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or name.startswith("score."))
    if not only_lora:
        for part in _norms_and_embeddings(model):
            part.requires_grad_(True)


def _norms_and_embeddings(model: PreTrainedModel) -> list[nn.Module]:
    output = model.get_output_embeddings()
    found = [part for part in model.modules() if isinstance(part, nn.Embedding) or "Norm" in type(part).__name__]
    # An adapted output layer has its adapters.
    return [*found, output] if isinstance(output, nn.Linear) else found


def trained_whole(model: PreTrainedModel) -> list[str]:
    """The names of the weights of an adapted model that are trained themselves, tied ones under each of their names."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora_" not in name]
    tied = (
        dict(getattr(model, "_tied_weights_keys", None) or {})
        if getattr(model.config, "tie_word_embeddings", False)
        else {}
    )
    return [*names, *(name for name, source in tied.items() if source in names)]


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """Within this context the model computes what it did before it was adapted."""
    layers = [part for part in module.modules() if isinstance(part, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


class AdaptersOff:
    """An engine's model without its adapters, called like the engine: the reference of an adapted policy."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    @property
    def module(self) -> Any:
        """The engine's model."""
        return self.engine.module

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """What the engine returns, computed without adapters."""
        with adapters_off(self.engine.module):
            return self.engine(*arguments, **options)


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is part of an adapter."""
    return name.endswith((_A, _B))


def is_adapted(model: nn.Module) -> bool:
    """Whether a model has adapters."""
    return any(isinstance(part, LoraLayer) for part in model.modules())


def merged_weights(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the plain model that computes what the adapted one does: W + scale · B A, added up in fp32."""
    scale = {name: part.scaling["default"] for name, part in model.named_modules() if isinstance(part, LoraLayer)}
    merged = {}
    for name, value in state.items():
        if name.endswith((_A, _B)):
            continue
        layer = name.split(f"{_BASE}.")[0] if f"{_BASE}." in name else ""
        if layer and name.endswith(".weight"):
            added = scale[layer] * (state[layer + _B].float() @ state[layer + _A].float())
            value = (value.float() + added).to(value.dtype)
        merged[name.replace(_BASE, "")] = value
    return merged


def adapter_weights(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapters, and what else is trained, as a scalar head, under the names that peft reads."""
    whole = trained_whole(model)
    return {
        f"base_model.model.{name.replace('.default', '')}": value
        for name, value in state.items()
        if name.endswith((_A, _B)) or name in whole
    }


def adapter_config(model: PreTrainedModel, *, base: str) -> LoraConfig:
    """The configuration that peft reads beside the adapters."""
    layer = next(part for part in model.modules() if isinstance(part, LoraLayer))
    names = {name.split(".")[-1] for name, part in model.named_modules() if isinstance(part, LoraLayer)}
    classifies = isinstance(getattr(model, "score", None), nn.Linear)
    return LoraConfig(
        r=layer.r["default"],
        lora_alpha=layer.lora_alpha["default"],
        target_modules=sorted(names),
        task_type="SEQ_CLS" if classifies else "CAUSAL_LM",
        modules_to_save=sorted({name.split(".")[-2] for name in trained_whole(model)}) or None,
        base_model_name_or_path=base,
        inference_mode=True,
    )
