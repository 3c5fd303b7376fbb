"""Whether the layers that LoRA is to adapt are there."""

from collections.abc import Iterator

from rlhf.config.explain import did_you_mean
from rlhf.config.schema import Config
from rlhf.planner.architecture import architecture_of
from rlhf.planner.parameters import block_linears


def adapter_problems(config: Config) -> Iterator[str]:
    """Say which names of `lora.targets` no layer of a model has; models of unknown sizes are trusted."""
    lora = config.lora
    if lora.targets is None or not (lora.rank or lora.critic_rank or lora.rm_rank):
        return
    models = {"model": config.model}
    if config.reward_model != config.model:
        models["reward_model"] = config.reward_model
    for key, model in models.items():
        sizes = architecture_of(model)
        if sizes is None:
            continue
        names = [layer.name for layer in block_linears(sizes)]
        for target in lora.targets:
            if target not in names:
                where = f"lora.targets={lora.targets}: {key}={model.name}"
                yield f"{where} has no {target}{did_you_mean(target, names)}"
