"""A policy and the reference that it is held to, as DeepSpeed engines."""

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.config.roles import Role, roles_of
from rlhf.config.schema import Config
from rlhf.engine.build import DTYPES, build_engine, partitioned_loading
from rlhf.engine.distributed import world_size
from rlhf.models.load import disable_dropout, load_causal_lm
from rlhf.models.lora import AdaptersOff
from rlhf.stages.session import adapt, enable_checkpointing


def build_causal(
    config: Config, role: Role, directory: str, tokenizer: PreTrainedTokenizerBase, *, total_steps: int
) -> tuple[PreTrainedModel, Any]:
    """A causal model in a role, without dropout, and its engine."""
    memory = config.memory
    with partitioned_loading(role, memory=memory, ranks=world_size()):
        model = load_causal_lm(
            directory,
            tokenizer,
            dtype=DTYPES[memory.precision],
            attention=config.model.attention,
            revision=config.model.revision if directory == config.model.path else None,
        )
    disable_dropout(model)
    return model, finish_engine(config, role, model, model, total_steps=total_steps)


def finish_engine(config: Config, role: Role, module: Any, model: PreTrainedModel, *, total_steps: int) -> Any:
    """Adapters and gradient checkpointing as the options say, then the engine of the module that holds the model."""
    if role.optimizer is not None:
        adapt(model, config, role)
    enable_checkpointing(model, role, memory=config.memory)
    return build_engine(
        module,
        role,
        memory=config.memory,
        ranks=world_size(),
        total_steps=total_steps,
        adapter_rate=config.lora.learning_rate,
    )


def build_policy(
    config: Config, directory: str, tokenizer: PreTrainedTokenizerBase, *, total_steps: int
) -> tuple[PreTrainedModel, Any]:
    """The role actor."""
    role = next(role for role in roles_of(config, config.stage) if role.name == "actor")
    return build_causal(config, role, directory, tokenizer, total_steps=total_steps)


def build_reference(config: Config, directory: str, tokenizer: PreTrainedTokenizerBase, *, actor: Any) -> Any:
    """The role reference; with its adapters off an adapted actor is what it started from, and no copy is kept."""
    role = next((role for role in roles_of(config, config.stage) if role.name == "reference"), None)
    if role is None:
        return AdaptersOff(actor)
    return build_causal(config, role, directory, tokenizer, total_steps=1)[1]
