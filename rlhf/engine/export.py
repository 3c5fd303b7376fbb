"""From an engine to a Hugging Face model directory that plain transformers loads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.config.writing import whole_directory, write_json
from rlhf.engine.distributed import barrier, rank
from rlhf.models.load import SAMPLING_DEFAULTS
from rlhf.models.lora import adapter_config, adapter_weights, is_adapted, merged_weights


def export_model(
    engine: Any,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    prefix: str = "",
    finish: Callable[[Path], None] | None = None,
    adapter_directory: Path | None = None,
) -> None:
    """Write weights (safetensors), configuration, tokenizer and chat template of a trained model. All ranks must call.

    generation_config.json says what ends an answer. The sampling defaults of the model that it was trained from stand
    beside it, in sampling_defaults.json: they were found for other weights.
    An adapted model is written merged, and its adapters, as peft reads them, to `adapter_directory`: by default one
    beside it that is called adapter.

    Args:
        engine: the engine whose module holds the model; under ZeRO-3 the shards are consolidated on rank 0.
        model: the transformers model within the module: the one whose class reads the directory later.
        tokenizer: saved beside the weights.
        directory: created; it appears whole or not at all.
        prefix: what the module's parameter names have in front of the model's, e.g. "classifier.".
        finish: called with the directory before it is put in its place, to add to what is there.
    """
    if engine.zero_optimization_partition_weights():
        state = engine._zero3_consolidated_16bit_state_dict()
    else:
        state = engine.module.state_dict()
    if rank() == 0:
        assert state is not None
        weights = {name.removeprefix(prefix): value.detach().cpu() for name, value in state.items()}
        if is_adapted(model):
            export_adapter(model, weights, adapter_directory or directory.with_name("adapter"))
            weights = merged_weights(model, weights)
        model.config.dtype = next(value.dtype for value in weights.values() if value.is_floating_point())
        with whole_directory(directory) as partial:
            model.save_pretrained(partial, state_dict=weights)
            tokenizer.save_pretrained(partial)
            if defaults := getattr(model, "sampling_defaults", None):
                write_json(partial / SAMPLING_DEFAULTS, defaults)
            if finish is not None:
                finish(partial)
    barrier()


def export_adapter(model: PreTrainedModel, weights: dict[str, Tensor], directory: Path) -> None:
    """Write the adapters of a model, whose unmerged weights are given, as peft reads them."""
    kept = {name: value.contiguous().clone() for name, value in adapter_weights(model, weights).items()}
    with whole_directory(directory) as partial:
        save_file(kept, partial / "adapter_model.safetensors")
        adapter_config(model, base=str(model.config._name_or_path or "")).save_pretrained(str(partial))
