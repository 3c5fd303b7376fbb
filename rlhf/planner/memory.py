"""What the model states of a stage take on each device, and the ZeRO stage that they need.

Weights, gradients and optimizer states are counted exactly (Rajbhandari et al. 2020, section 3); activations are not
counted, but room is left for them when a ZeRO stage is chosen.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

from rlhf.config.choices import PtxMode, RolloutBackend
from rlhf.config.roles import Role, roles_of
from rlhf.config.schema import Accelerator, Config, ModelConfig, Precision, StageConfig, WeightSource
from rlhf.planner.architecture import architecture_of, from_directory
from rlhf.planner.parameters import (
    Head,
    lora_parameter_count,
    norm_and_embedding_parameters,
    parameter_count,
    scalar_head_parameters,
)

GIB, MIB = 1024**3, 1024**2
# The device's context, communication buffers and fragmentation, per GPU; on a CPU the Python process.
RESERVE_GIB = {Accelerator.cuda: 4.7, Accelerator.cpu: 0.5}
ACTIVATION_SHARE = 0.15
CACHE_SHARE = 0.5  # Of what is free beside weights and states, that native decoding's keys and values may take.
FP16_NEEDS_ZERO = "without ZeRO DeepSpeed does not scale the loss of fp16"
_FP32 = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class RoleStates:
    """Bytes of one role's states on one device, and what of them lies in the host's memory."""

    role: str
    parameters: int
    trainable: int
    weights: float
    gradients: float
    optimizer: float
    host: float

    @property
    def device(self) -> float:
        """Bytes on the device."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True, kw_only=True, slots=True)
class StageMemory:
    """The states of a stage on one device, in bytes.

    `gathered` is the policy's copy that generates, where one is needed: whole under ZeRO-3, with adapters merged, or
    packed on a CPU. Of it `outer` are embeddings and output layer, which every rank holds if several share the rest.
    `cache` are the keys and values of one sequence of the longest prompt and response, without which none is generated.
    """

    stage: str
    roles: tuple[RoleStates, ...]
    gathered: float
    outer: float
    cache: float
    reserve: float
    capacity: float | None
    host_capacity: float | None

    @property
    def states(self) -> float:
        """Bytes of all roles on the device."""
        return sum(role.device for role in self.roles)

    @property
    def host(self) -> float:
        """Bytes of all roles of one rank in the host's memory."""
        return sum(role.host for role in self.roles)

    def shared(self, ranks: int) -> float:
        """Bytes of the copy that generates on each of the ranks that share it."""
        return self.outer + (self.gathered - self.outer) / ranks

    def fits(self, *, ranks: int | None = None, activations: float = 0.0) -> bool:
        """Whether everything fits, with what generates, shared by some ranks (None: without it).

        Unknown sizes fit.
        """
        if self.host_capacity is not None and self.host > self.host_capacity:
            return False
        if self.capacity is None:
            return True
        peak = self.states + self.reserve + activations * self.capacity
        more = self.shared(ranks) + self.cache / ranks / CACHE_SHARE if ranks is not None else 0.0
        return peak + more <= self.capacity


def substages(stage: StageConfig) -> list[StageConfig]:
    """A pipeline's stages, or the stage itself."""
    inner = [value for entry in fields(stage) if isinstance(value := getattr(stage, entry.name), StageConfig)]
    return inner or [stage]


def ranks_of(config: Config) -> int:
    """Ranks over all machines."""
    return max(1, (config.hardware.gpus_per_node or 1) * config.hardware.nodes)


def role_model(config: Config, stage: StageConfig, role: Role) -> ModelConfig:
    """The configured model that a role has the sizes of: a directory that the stage names goes before the choice."""
    reward_model = config.reward_model if config.reward_model.name else config.model
    chosen = config.model if role.model_key == "model" else reward_model
    directory = getattr(stage, role.directory_key, None) if role.directory_key else role.path
    if isinstance(directory, str) and from_directory(Path(directory)) is not None:
        targets = chosen.lora_targets
        return ModelConfig(name=role.name, source=WeightSource.pretrained, path=directory, lora_targets=targets)
    return chosen


def stage_memory(config: Config, stage: StageConfig) -> StageMemory | None:
    """The model states of a stage on one device; None if a model's sizes are not known.

    `memory.zero_stage` must be resolved.
    """
    found = [_role_states(config, stage, role) for role in roles_of(config, stage)]
    roles = [states for states in found if states is not None]
    if len(roles) < len(found):
        return None
    hardware = config.hardware
    on_cpu = hardware.accelerator is Accelerator.cpu
    per_machine = max(1, hardware.gpus_per_node or 1)
    host = hardware.host_memory_gib * GIB / per_machine if hardware.host_memory_gib is not None else None
    device = hardware.gpu_memory_gib * GIB if hardware.gpu_memory_gib is not None else None
    actor = next((role for role in stage.roles() if role.generates), None)
    whole = next((states.parameters for states in roles if actor is not None and states.role == actor.name), 0)
    copied = (
        whole * _bytes_per_weight(config) if actor is not None and _generates_from_a_copy(config, stage, actor) else 0.0
    )
    sizes = architecture_of(config.model)
    outer = sizes.vocab_size * sizes.hidden_size * (1 if sizes.tied_embeddings else 2) if sizes is not None else 0
    return StageMemory(
        stage=stage.name,
        roles=tuple(roles),
        gathered=copied,
        outer=min(copied, float(outer * _bytes_per_weight(config))),
        cache=_sequence_cache(config) if actor is not None else 0.0,
        reserve=RESERVE_GIB[Accelerator.cpu if on_cpu else Accelerator.cuda] * GIB,
        capacity=host if on_cpu else device,
        host_capacity=None if on_cpu else host,
    )


def _generates_from_a_copy(config: Config, stage: StageConfig, actor: Role) -> bool:
    if config.memory.of_role(actor.name, trained=True).zero_stage == 3:
        return True  # On CPUs a machine's ranks may share it: this is the most that each of them needs.
    if config.rollout.backend is RolloutBackend.vllm:
        return True
    if config.rollout.backend is RolloutBackend.hf:
        return False  # It generates with the weights and the adapters as they are.
    # With a compiler there is none: this is the most that may be needed.
    packed = config.hardware.accelerator is Accelerator.cpu and config.memory.precision is Precision.bf16
    return packed or (actor.optimizer is not None and config.lora.adapts(stage=stage.name, role=actor.name))


def decodes_in_place(config: Config) -> bool:
    """Whether native decoding can do with the policy's weights as they are: they are whole on each rank, unshared."""
    roles = [role for stage in substages(config.stage) for role in stage.roles() if role.generates]
    partitioned = any(config.memory.of_role(role.name, trained=True).zero_stage == 3 for role in roles)
    native = config.rollout.backend in (RolloutBackend.auto, RolloutBackend.native)
    return native and not partitioned and (config.rollout.tensor_parallel or 1) == 1


def longest_sequence(config: Config) -> int:
    """Tokens of the longest prompt and response."""
    return config.data.max_prompt_length + (config.rollout.max_new_tokens or config.data.max_response_length)


def _sequence_cache(config: Config) -> float:
    """Bytes of the longest sequence's keys and values; 0 for a model whose sizes are not known."""
    shape = architecture_of(config.model)
    if shape is None:
        return 0.0
    width = (shape.num_kv_heads or shape.num_heads) * (shape.head_dim or shape.hidden_size // shape.num_heads)
    return 2.0 * shape.num_layers * width * longest_sequence(config) * _bytes_per_weight(config)


def _bytes_per_weight(config: Config) -> int:
    return 4 if config.memory.precision is Precision.fp32 else 2


def _role_states(config: Config, stage: StageConfig, role: Role) -> RoleStates | None:
    model = role_model(config, stage, role)
    sizes = architecture_of(model)
    if sizes is None:
        return None
    ranks, width = ranks_of(config), _bytes_per_weight(config)
    trained = role.optimizer is not None
    placed = config.memory.of_role(role.name, trained=trained)
    head = Head.scalar if role.scalar else Head.lm
    parameters = parameter_count(sizes, head=head)
    trainable = parameters if trained else 0
    rank = config.lora.rank_of(stage=stage.name, role=role.name) if trained else None
    if rank is not None:
        targets = model.lora_targets if config.lora.targets is None else config.lora.targets
        trainable = lora_parameter_count(sizes, rank=rank, targets=targets)
        parameters += trainable
        if not config.lora.only_lora:
            trainable += norm_and_embedding_parameters(sizes, head=head)
        if role.scalar:
            # The head of a scalar model is not adapted but trained itself.
            trainable += scalar_head_parameters(sizes)
    zero = placed.zero_stage
    # Adam's two moments, and the fp32 weights that it updates: ZeRO keeps its own even of an fp32 model.
    optimizer_width = 2 * _FP32 if zero == 0 and width == _FP32 else 3 * _FP32
    weights = width * parameters / (ranks if zero == 3 else 1)
    gradients = width * trainable / (ranks if zero >= 2 else 1)
    optimizer = optimizer_width * trainable / (ranks if zero >= 1 else 1)
    if role.averaged:
        optimizer += _FP32 * trainable / ranks
    if role.extra_batch_size:
        # The policy's reduced gradient is kept while the text's is accumulated.
        optimizer += width * trainable / ranks
    host = weights if placed.offload_parameters else 0.0
    if placed.offload_optimizer:
        # The optimizer there has fp32 gradients of its own; ZeRO-3 keeps the others there, too.
        host += optimizer + _FP32 * trainable / ranks
        if zero == 3:
            host, gradients = host + gradients, 0.0
    return RoleStates(
        role=role.name,
        parameters=parameters,
        trainable=trainable,
        weights=0.0 if placed.offload_parameters else weights,
        gradients=gradients,
        optimizer=0.0 if placed.offload_optimizer else optimizer,
        host=host,
    )


def choose_zero_stage(config: Config) -> int:
    """The first ZeRO stage whose states leave room for activations in every stage of the run; 0 on one rank.

    One rank has nothing to share, but in fp16 it needs ZeRO's loss scaling; on several, ZeRO-1 costs no more
    communication than ZeRO-0.
    """
    if ranks_of(config) == 1:
        return 1 if config.memory.precision is Precision.fp16 else 0
    for zero_stage in (1, 2, 3):
        tried = replace(config, memory=replace(config.memory, zero_stage=zero_stage))
        estimates = [stage_memory(tried, stage) for stage in substages(config.stage)]
        if all(estimate is None or estimate.fits(activations=ACTIVATION_SHARE) for estimate in estimates):
            return zero_stage
    return 3


def rollout_ranks(config: Config) -> int | None:
    """The fewest ranks over which the policy fits beside the states while it generates; None if it does over none.

    More than one is for native decoding of a partitioned policy: the ranks of a machine, of a number that divides the
    policy's heads. A policy that is whole on each rank needs no copy, if none fits.
    """
    estimates = [stage_memory(config, stage) for stage in substages(config.stage)]
    wanted = config.rollout.tensor_parallel
    shape = architecture_of(config.model)
    heads = (shape.num_kv_heads or shape.num_heads) if shape is not None else 1
    most = config.hardware.gpus_per_node or 1
    if config.rollout.backend is RolloutBackend.hf or decodes_in_place(config):
        most = 1
    counts = [count for count in range(1, most + 1) if most % count == 0 and heads % count == 0]
    for count in counts if wanted is None else [wanted]:
        if all(estimate is None or estimate.fits(ranks=count) for estimate in estimates):
            return count
    return None


def memory_problems(config: Config) -> Iterator[str]:
    """Say of every stage whose states the hardware cannot hold how much is missing, and what would help."""
    for stage in substages(config.stage):
        estimate = stage_memory(config, stage)
        if estimate is None or estimate.fits():
            continue
        parts = ", ".join(f"{role.role} {role.device / GIB:.1f}" for role in estimate.roles)
        hardware, memory = config.hardware, config.memory
        if estimate.capacity is not None and estimate.states + estimate.reserve > estimate.capacity:
            place = "GPU" if hardware.accelerator is Accelerator.cuda else "rank"
            yield (
                f"memory.zero_stage={memory.zero_stage}: the model states of stage {stage.name} take "
                f"{estimate.states / GIB:.1f} GiB on each {place} ({parts}) beside {estimate.reserve / GIB:.1f} GiB "
                f"that are never free, but hardware={hardware.name or 'this'} has {estimate.capacity / GIB:.1f} GiB"
                f"{_remedy(config)}"
            )
        else:
            assert estimate.host_capacity is not None
            yield (
                f"memory.offload_optimizer={str(memory.offload_optimizer).lower()}: stage {stage.name} keeps "
                f"{estimate.host / GIB:.1f} GiB per GPU in the host's memory, but there are "
                f"{estimate.host_capacity / GIB:.1f} GiB for each: use more machines, or lora=r128"
            )


def _remedy(config: Config) -> str:
    """What would make the states fit, cheapest first; larger hardware if nothing here does."""
    lora = config.lora if config.lora.rank is not None else replace(config.lora, rank=128)
    zero3 = replace(config.memory, zero_stage=3)
    offloaded = replace(zero3, offload_parameters=True, offload_optimizer=True)
    on_gpu = config.hardware.accelerator is Accelerator.cuda
    steps = {"memory=zero3": replace(config, memory=zero3)} if ranks_of(config) > 1 else {}
    steps |= {"lora=r128": replace(config, lora=lora)}
    steps |= {"memory=zero3-offload": replace(config, memory=offloaded)} if on_gpu else {}
    steps |= {"lora=r128 memory=zero3": replace(config, lora=lora, memory=zero3)} if ranks_of(config) > 1 else {}
    steps |= {"lora=r128 memory=zero3-offload": replace(config, lora=lora, memory=offloaded)} if on_gpu else {}
    fitting: list[str] = []
    for name, changed in steps.items():
        # A step that contains another one that is enough is no further help.
        if not any(all(part in name.split() for part in known.split()) for known in fitting) and _holds(changed):
            fitting.append(name)
    return f": {' or '.join([*fitting, 'hardware with more or larger GPUs'])} would help"


def _holds(config: Config) -> bool:
    estimates = [stage_memory(config, stage) for stage in substages(config.stage)]
    return all(estimate is None or estimate.fits() for estimate in estimates)


def cache_problems(config: Config) -> Iterator[str]:
    """Say where states leave no room for one sequence's keys and values; no copy is decided on where there is none."""
    if config.rollout.gather or not decodes_in_place(config):
        return
    for stage in substages(config.stage):
        estimate = stage_memory(config, stage)
        if estimate is None or estimate.capacity is None or not estimate.fits():
            continue
        free = estimate.capacity - estimate.states - estimate.reserve
        if estimate.cache > CACHE_SHARE * free:
            yield (
                f"memory.zero_stage={config.memory.zero_stage}: the keys and values of one sequence of "
                f"{longest_sequence(config)} tokens take {estimate.cache / MIB:.1f} MiB in stage {stage.name}, but at "
                f"most {CACHE_SHARE:.0%} of the {free / MIB:.1f} MiB that are free beside its model states may be "
                "taken: lower data.max_response_length or data.max_prompt_length, or make room by a higher ZeRO stage, "
                "adapters (lora=r128) or larger hardware"
            )


def rollout_problems(config: Config) -> Iterator[str]:
    """Say what of the options of generation contradicts others, or what ranks that share the weights must divide."""
    rollout = config.rollout
    ranks, shape = rollout.tensor_parallel or 1, architecture_of(config.model)
    if "" in rollout.stop:
        yield f"rollout.stop={rollout.stop}: an empty text would end every response at once"
    longest = rollout.max_new_tokens or config.data.max_response_length
    if rollout.min_new_tokens > longest:
        yield f"rollout.min_new_tokens={rollout.min_new_tokens}: more than the {longest} tokens of the longest response"
    if rollout.importance_cap is not None and rollout.backend is RolloutBackend.hf:
        yield (
            f"rollout.importance_cap={rollout.importance_cap:g}: does nothing with rollout.backend=hf, whose tokens "
            "come without log-probabilities"
        )
    if ranks == 1:
        return
    key = f"rollout.tensor_parallel={ranks}"
    if config.rollout.backend is RolloutBackend.hf:
        yield f"{key}: transformers' generate shares no weights; rollout.backend=native or auto does"
    per_machine = config.hardware.gpus_per_node or 1
    if per_machine % ranks:
        yield f"{key}: does not divide the {per_machine} ranks of a machine"
    if shape is not None and (shape.num_heads % ranks or (shape.num_kv_heads or ranks) % ranks):
        yield (
            f"{key}: does not divide the model's {shape.num_heads} heads and {shape.num_kv_heads or shape.num_heads} "
            "heads of keys and values"
        )


def precision_problems(config: Config) -> Iterator[str]:
    """Say where fp16 would be trained with gradients that DeepSpeed divides by a scale which it never applied."""
    if config.memory.precision is not Precision.fp16:
        return
    roles = [role for stage in substages(config.stage) for role in stage.roles() if role.optimizer is not None]
    for name in dict.fromkeys(role.name for role in roles):
        if config.memory.of_role(name, trained=True).zero_stage == 0:
            yield f"memory.zero_stage=0: {FP16_NEEDS_ZERO} ({name}): use memory.zero_stage=1 or more"


def mix_problems(config: Config) -> Iterator[str]:
    """Say where the weight of the pretraining mix could not follow the gradients' norms."""
    for stage in substages(config.stage):
        ptx = getattr(stage, "ptx", None)
        if ptx is None or ptx.mode is not PtxMode.grad_ratio:
            continue
        actor = config.memory.of_role("actor", trained=True)
        if actor.offload_optimizer and actor.zero_stage in (1, 2):
            yield (
                f"stage.ptx.mode=grad_ratio: ZeRO-{actor.zero_stage} with the optimizer on the host tells no two "
                "gradients apart; take memory.zero_stage=3 or stage.ptx.mode=coef"
            )
