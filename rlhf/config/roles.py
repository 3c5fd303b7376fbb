"""What a stage needs from the launcher and the engine for each of its models."""

from dataclasses import dataclass, replace

from rlhf.config.schema import REWARD_MODEL, Config, OptimizerConfig, StageConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Role:
    """One model of a stage: actor, critic, reference, reward_model, or simply model.

    `batch_size` is the global number of sequences per optimizer step, `micro_batch_size_per_gpu` those of one forward
    and backward pass on one rank. A role without an optimizer is never trained. `model_key` is the configured model
    that it has the sizes of (model or reward_model), `directory_key` the stage's option that may name another one.
    A scalar role ends in one number instead of logits. A role that generates samples the responses. `path` is a
    directory that no option of the stage names. An averaged role keeps an fp32 average of its weights.
    `extra_batch_size` sequences of another kind are accumulated in the same optimizer step.
    """

    name: str
    optimizer: OptimizerConfig | None
    batch_size: int
    micro_batch_size_per_gpu: int
    model_key: str = "model"
    directory_key: str | None = None
    scalar: bool = False
    generates: bool = False
    path: str | None = None
    averaged: bool = False
    extra_batch_size: int = 0

    def accumulation_steps(self, ranks: int) -> int:
        """Micro-batches per optimizer step on each rank: those of both batches / (micro_batch_size_per_gpu * ranks)."""
        per_step = max(1, self.micro_batch_size_per_gpu * ranks)
        return max(1, self.batch_size // per_step) + -(-self.extra_batch_size // per_step)


def roles_of(config: Config, stage: StageConfig) -> list[Role]:
    """The models that a stage keeps.

    Without the reference where the actor with its adapters off is the reference, that is, where nothing else of it is
    trained; with as many reward models as score.
    """
    roles = []
    for role in stage.roles():
        adapted = config.lora.only_lora and config.lora.adapts(stage=stage.name, role="actor")
        if role.name == "reference" and adapted:
            continue
        if role.name != REWARD_MODEL:
            roles.append(role)
        elif config.scorer.kind == REWARD_MODEL:
            roles.append(role)
            for number, path in enumerate(config.scorer.others, start=2):
                roles.append(replace(role, name=f"{REWARD_MODEL}_{number}", directory_key=None, path=path))
    return roles


def divisibility_problems(key: str, batch_size: int, micro_batch_size_per_gpu: int, ranks: int) -> list[str]:
    """Say why a global batch can't be cut into whole micro-batches on all ranks; name the nearest sizes that can."""
    micro_key = f"{key.rpartition('.')[0]}.micro_batch_size_per_gpu"
    if batch_size < 1 or micro_batch_size_per_gpu < 1:
        return [f"{key}={batch_size} with {micro_key}={micro_batch_size_per_gpu}: both must be at least 1"]
    unit = micro_batch_size_per_gpu * ranks
    if batch_size % unit == 0:
        return []
    what = f"{micro_key} × ranks = {micro_batch_size_per_gpu} × {ranks} = {unit}"
    if batch_size // ranks == micro_batch_size_per_gpu:  # Chosen for this batch: another one changes it, too.
        unit, what = ranks, f"the {ranks} ranks"
    below, above = batch_size // unit * unit, (batch_size // unit + 1) * unit
    choices = f"{above}" if below == 0 else f"{below} or {above}"
    other = "take other hardware.gpus_per_node" if unit == ranks else "change the micro-batch"
    return [f"{key}={batch_size} is not a multiple of {what}: set it to {choices}, or {other}"]
