"""Whether prompts, responses and directories fit the models that a configuration chooses."""

from collections.abc import Iterator
from pathlib import Path

from rlhf.config.files import read_yaml
from rlhf.config.roles import roles_of
from rlhf.config.schema import Config, StageConfig
from rlhf.planner.architecture import PACKABLE, PACKING_ATTENTION, architecture_of, from_directory
from rlhf.planner.memory import role_model, substages


def length_problems(config: Config) -> Iterator[str]:
    """Say which model has too few positions for the longest prompt with the longest response."""
    response = max(config.rollout.max_new_tokens or 0, config.data.max_response_length)
    longest = config.data.max_prompt_length + response
    for stage in substages(config.stage):
        for role in roles_of(config, stage):
            model = role_model(config, stage, role)
            sizes = architecture_of(model)
            if sizes is None or not 0 < sizes.max_positions < longest:
                continue
            key = "model" if role.model_key == "model" or config.reward_model == config.model else "reward_model"
            remedy = f"set {key}.scratch.max_positions={longest} or more, or " if model.source.name == "scratch" else ""
            yield (
                f"data.max_prompt_length={config.data.max_prompt_length}: with responses of {response} tokens that is "
                f"{longest}, but {key}={model.name} has {sizes.max_positions} positions: "
                f"{remedy}lower data.max_prompt_length or data.max_response_length"
            )


def packing_problems(config: Config) -> Iterator[str]:
    """Say whether packed examples could not be kept apart."""
    sizes = architecture_of(config.model)
    for stage in substages(config.stage):
        if not getattr(stage, "packing", False):
            continue
        if sizes is not None and sizes.family not in PACKABLE:
            yield (
                f"stage.packing=true: model={config.model.name} is {sizes.family}, and only {', '.join(PACKABLE)} keep "
                "packed examples apart; leave packing off"
            )
        if config.model.attention not in PACKING_ATTENTION:
            yield (
                f"model.attention={config.model.attention}: stage.packing=true needs "
                f"{' or '.join(PACKING_ATTENTION)}; leave packing off or change the attention"
            )


def directory_problems(config: Config, stage: StageConfig) -> Iterator[str]:
    """Say where a stage starts from a directory that was made from another model than the chosen one.

    The chosen model's tuned values, sizes and adapters would silently be used for the other one.
    """
    seen: set[str] = set()
    for role in roles_of(config, stage):
        directory = getattr(stage, role.directory_key, None) if role.directory_key else None
        if not isinstance(directory, str) or directory in seen:
            continue
        seen.add(directory)
        same = config.reward_model == config.model
        key = "model" if role.model_key == "model" or same else "reward_model"
        chosen = config.model if key == "model" else config.reward_model
        option = f"model={{}}{' or model@reward_model={}' if role.model_key == 'reward_model' else ''}"
        made_of = _model_of_run(Path(directory), role.model_key)
        if made_of is not None and made_of != chosen.name:
            choice = option.replace("{}", made_of)
            yield (
                f"stage.{role.directory_key}={directory}: was trained from {made_of}, not from {chosen.name}: "
                f"add {choice}"
            )
            continue
        found, expected = from_directory(Path(directory)), architecture_of(chosen)
        if found is None or expected is None:
            continue
        ours = (expected.family, expected.num_layers, expected.hidden_size)
        theirs = (found.family, found.num_layers, found.hidden_size)
        if ours != theirs:
            yield (
                f"stage.{role.directory_key}={directory}: holds {_described(theirs)}, but {key}={chosen.name} is "
                f"{_described(ours)}: choose the model that it was made from, or  model=hf model.path={directory}"
            )


def _described(sizes: tuple[str | None, int, int]) -> str:
    return f"{sizes[0]} with {sizes[1]} layers of width {sizes[2]}"


def _model_of_run(directory: Path, model_key: str) -> str | None:
    """The model that the run was configured with whose output a directory is; None if it is nobody's output."""
    path = directory.parent / "config.yaml"
    if not path.is_file():
        return None
    try:
        values = read_yaml(path)
    except ValueError:
        return None
    model = values.get(model_key) if values.get("stage", {}).get("name") != "sft" else values.get("model")
    return str(model["name"]) if isinstance(model, dict) and model.get("name") else None
