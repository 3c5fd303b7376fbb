"""What this machine has, and a configuration made concrete for it. Imports no torch."""

import importlib.util
import math
import os
import re
import subprocess
from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from rlhf.config.schema import (
    Accelerator,
    Config,
    HardwareConfig,
    LauncherConfig,
    LauncherKind,
    MemoryConfig,
    Mode,
    ModelConfig,
    Precision,
    StageConfig,
    WeightSource,
)
from rlhf.planner.memory import choose_zero_stage, rollout_ranks, substages

CPU_RANKS = 2
MICRO_BATCH = 8  # Sequences in a micro-batch that nobody chose, at most.
_RUNS_HERE = (LauncherKind.local, LauncherKind.no_ssh)


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """A GPU that torch can use: its index, name, memory in GiB, and compute capability."""

    index: int
    name: str
    memory_gib: float
    capability: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Cores that this process may use, usable GPUs, whether the CPU computes in bf16, and its memory in GiB."""

    cores: int
    gpus: tuple[Gpu, ...]
    cpu_bf16: bool
    host_memory_gib: float | None = None

    @property
    def gpu_bf16(self) -> bool:
        """Whether every GPU computes in bf16."""
        return bool(self.gpus) and min(gpu.capability for gpu in self.gpus) >= 8.0

    def described(self) -> str:
        """The accelerators in words."""
        names = {gpu.name: sum(other.name == gpu.name for other in self.gpus) for gpu in self.gpus}
        return ", ".join(f"{count} × {name}" for name, count in names.items()) or "no GPU"


def usable_cores() -> int:
    """Cores of this process's affinity mask, or the container's quota where that is smaller; at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return max(1, cores)
    return max(1, min(cores, int(quota) // int(period))) if quota != "max" else max(1, cores)


def cpu_computes_bf16(cpuinfo: str) -> bool:
    """Whether /proc/cpuinfo names instructions for bf16: avx512_bf16, amx_bf16; bf16 on Arm."""
    pattern = r"^(flags|Features)\s*:.*\b(avx512_bf16|amx_bf16|bf16)\b"
    return re.search(pattern, cpuinfo, flags=re.MULTILINE) is not None


def visible_gpus() -> tuple[Gpu, ...]:
    """The GPUs that `nvidia-smi` lists and CUDA_VISIBLE_DEVICES leaves, in its order."""
    query = "--query-gpu=index,uuid,compute_cap,memory.total,name"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
        rows = [[cell.strip() for cell in line.split(",", 4)] for line in listed if line.strip()]
        gpus = {
            int(index): Gpu(index=int(index), name=name, memory_gib=float(mib) / 1024, capability=float(capability))
            for index, _, capability, mib, name in rows
        }
    except (OSError, subprocess.SubprocessError, ValueError):
        return ()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return tuple(gpus.values())
    named = {row[0]: int(row[0]) for row in rows} | {row[1]: int(row[0]) for row in rows}
    chosen: list[Gpu] = []
    for entry in (part.strip() for part in visible.split(",")):
        if entry not in named:
            break  # CUDA itself ignores everything from the first invalid entry on.
        chosen.append(gpus[named[entry]])
    return tuple(chosen)


def host_memory() -> float | None:
    """This machine's memory in GiB, or None if it cannot be told."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1024**3
    except (ValueError, OSError):
        return None


def torch_has_cuda() -> bool:
    """Whether the installed torch is a CUDA build, read from its version file."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    version = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    return re.search(r"^cuda\b[^=]*=\s*['\"]", version, flags=re.MULTILINE) is not None


def detect() -> Machine:
    """Look at this machine."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        cpuinfo = ""
    return Machine(
        cores=usable_cores(),
        gpus=visible_gpus() if torch_has_cuda() else (),
        cpu_bf16=cpu_computes_bf16(cpuinfo),
        host_memory_gib=host_memory(),
    )


def resolve(
    config: Config, machine: Machine, *, adjustable: Collection[str] = (), asked: Collection[str] = ()
) -> Config:
    """Return the configuration with everything automatic decided, so that it says what will run.

    Fills in the accelerator, ranks and threads, the precision, the ZeRO stage, and the reward model where it is the
    same as the model; makes paths absolute. Micro-batches whose keys are `adjustable`, as tuned ones are, become
    smaller where they do not divide their share of the batch. Batches whose keys are `asked` for do not change the
    number of ranks: where they do not divide, that is told.
    """
    model = _absolute_model(config.model)
    reward_model = model if config.reward_model == ModelConfig() else _absolute_model(config.reward_model)
    sources = {name: replace(s, path=_absolute(s.path)) for name, s in config.data.sources.items()}
    hardware = _hardware(config.hardware, machine)
    stage = _absolute_models(config.stage)
    if config.hardware.gpus_per_node is None and hardware.gpus_per_node:
        hardware, stage = _divided(hardware, stage, asked)
    ranks = max(1, (hardware.gpus_per_node or 1) * hardware.nodes)
    stage = _with_micro_batches(stage, ranks, adjustable=adjustable)
    config = replace(
        config,
        stage=stage,
        model=model,
        reward_model=reward_model,
        data=replace(config.data, sources=sources),
        hardware=hardware,
        launcher=_launcher(config.launcher, hardware),
        scorer=replace(
            config.scorer,
            others=[str(_absolute(path)) for path in config.scorer.others],
            function=_absolute_reference(config.scorer.function),
        ),
        memory=_precision(config.memory, hardware),
        run_dir=_absolute(config.run_dir),
        cache_dir=_absolute(config.cache_dir),
    )
    if config.memory.zero_stage is None:
        config = replace(config, memory=replace(config.memory, zero_stage=choose_zero_stage(config)))
    wanted = config.rollout.tensor_parallel
    if config.rollout.gather is None and (wanted is None or wanted > 0):  # What cannot be is said later.
        shared = rollout_ranks(config)
        placed = replace(config.rollout, gather=shared is not None, tensor_parallel=wanted or shared or 1)
        config = replace(config, rollout=placed)
    return config


def _hardware(hardware: HardwareConfig, machine: Machine) -> HardwareConfig:
    accelerator = hardware.accelerator
    if accelerator is Accelerator.auto:
        accelerator = Accelerator.cuda if machine.gpus else Accelerator.cpu
    on_gpu = accelerator is Accelerator.cuda
    ranks = hardware.gpus_per_node
    if ranks is None:
        ranks = (len(machine.gpus) or None) if on_gpu else CPU_RANKS
    memory, bf16, host = hardware.gpu_memory_gib, hardware.bf16, hardware.host_memory_gib
    if memory is None and on_gpu and machine.gpus:
        memory = min(gpu.memory_gib for gpu in machine.gpus)
    if bf16 is None:
        bf16 = machine.gpu_bf16 if on_gpu else machine.cpu_bf16
    return replace(
        hardware,
        accelerator=accelerator,
        gpus_per_node=ranks,
        threads_per_rank=hardware.threads_per_rank or max(1, machine.cores // max(1, ranks or 1)),
        gpu_memory_gib=memory,
        bf16=bf16,
        host_memory_gib=machine.host_memory_gib if host is None else host,
    )


def _divided(
    hardware: HardwareConfig, stage: StageConfig, asked: Collection[str]
) -> tuple[HardwareConfig, StageConfig]:
    """As many of this machine's ranks as divide every global batch, and micro-batches that then divide it too.

    Only for numbers that nobody asked for: three GPUs train a batch of 64 on two. Batches that were asked for, and
    those that are no multiple of their micro-batch, are left as they are, for the user to mend.
    """
    names = {id(each): f"stage.{each.name}." if each is not stage else "stage." for each in substages(stage)}
    given = [
        inner
        for inner in substages(stage)
        if any(f"{names[id(inner)]}{size}" in asked for size in ("batch_size", "mini_batch_size"))
    ]
    roles = [
        role for inner in substages(stage) if inner not in given for role in inner.roles() if role.optimizer is not None
    ]
    if any(role.batch_size % (role.micro_batch_size_per_gpu or 1) for role in roles):
        return hardware, stage
    batches = [role.batch_size for role in roles]
    available = hardware.gpus_per_node or 1
    ranks = next((n for n in range(available, 0, -1) if all(batch % n == 0 for batch in batches)), 1)
    per_node = replace(hardware, gpus_per_node=ranks)
    return per_node, _with_micro_batches(stage, ranks * max(1, hardware.nodes), adjustable=None, kept=asked)


def unused_ranks(composed: Config, resolved: Config, machine: Machine) -> str:
    """What to say where a run uses fewer of this machine's ranks than there are, unasked ("" if it does not)."""
    used = resolved.hardware.gpus_per_node or 0
    on_gpu = resolved.hardware.accelerator is Accelerator.cuda
    available = len(machine.gpus) if on_gpu else CPU_RANKS
    if composed.hardware.gpus_per_node is not None or not 0 < used < available:
        return ""
    sizes = sorted({role.batch_size for each in substages(resolved.stage) for role in each.roles() if role.optimizer})
    what = "GPUs" if on_gpu else "CPU ranks"
    return (
        f"hardware: {used} of {available} {what} are used: {available} do not divide the batches of "
        f"{', '.join(map(str, sizes))} sequences; other batch sizes would use all"
    )


def _with_micro_batches(
    stage: StageConfig,
    ranks: int,
    *,
    adjustable: Collection[str] | None,
    kept: Collection[str] = (),
    prefix: str = "stage",
) -> StageConfig:
    """Choose the micro-batches that are left open, and make the adjustable ones (None: all but `kept`) smaller."""
    changed: dict[str, Any] = {}
    for entry in fields(stage):
        value, key = getattr(stage, entry.name), f"{prefix}.{entry.name}"
        if isinstance(value, StageConfig):
            changed[entry.name] = _with_micro_batches(value, ranks, adjustable=adjustable, kept=kept, prefix=key)
        elif entry.name == "micro_batch_size_per_gpu":
            share = math.gcd(*(role.batch_size // ranks for role in stage.roles() if role.optimizer is not None))
            if value == 0:
                changed[entry.name] = max((n for n in range(1, MICRO_BATCH + 1) if share % n == 0), default=1)
            elif key in adjustable if adjustable is not None else key not in kept:
                changed[entry.name] = math.gcd(value, share) or value
    return replace(stage, **changed)


def _launcher(launcher: LauncherConfig, hardware: HardwareConfig) -> LauncherConfig:
    kind = launcher.kind
    if kind is LauncherKind.local and hardware.nodes > 1:
        kind = LauncherKind.pdsh  # DeepSpeed's own choice for several machines.
    return replace(launcher, kind=kind, hostfile=_absolute(launcher.hostfile))


def machine_problems(config: Config, machine: Machine) -> Iterator[str]:
    """Say in what this machine differs from the hardware that a run on it needs. The config must be resolved."""
    hardware = config.hardware
    if config.mode is not Mode.run:
        if hardware.gpus_per_node is None and hardware.accelerator is Accelerator.cuda:
            yield (
                "hardware.accelerator=cuda: no GPU was found here, so say how many to plan with, as in  "
                "hardware.gpus_per_node=8, or choose a profile, as in  hardware=8xa100"
            )
        return
    if hardware.accelerator is not Accelerator.cuda or config.launcher.kind not in _RUNS_HERE:
        return
    name, needed = hardware.name or "cuda", hardware.gpus_per_node or 1
    elsewhere = "; mode=plan works here, and hardware=local takes what there is"
    if not machine.gpus:
        yield f"hardware={name}: no GPU was found that the installed torch can use{elsewhere}"
    elif needed > len(machine.gpus):
        yield (
            f"hardware.gpus_per_node={needed}: this machine has {len(machine.gpus)} usable GPUs "
            f"({machine.described()}){elsewhere}"
        )
    elif hardware.gpu is not None:
        used = machine.gpus[:needed]
        others = [gpu for gpu in used if hardware.gpu.lower() not in gpu.name.lower()]
        small = [gpu for gpu in used if gpu.memory_gib < 0.9 * (hardware.gpu_memory_gib or 0.0)]
        if others or small:
            found = (others or small)[0]
            yield (
                f"hardware={name}: needs {hardware.gpu} with {hardware.gpu_memory_gib:g} GiB, but GPU {found.index} is "
                f"{found.name} with {found.memory_gib:.0f} GiB{elsewhere}"
            )


def _precision(memory: MemoryConfig, hardware: HardwareConfig) -> MemoryConfig:
    if memory.precision is not Precision.auto:
        return memory
    fallback = Precision.fp16 if hardware.accelerator is Accelerator.cuda else Precision.fp32
    return replace(memory, precision=Precision.bf16 if hardware.bf16 else fallback)


def _absolute(path: str | None) -> str | None:
    return None if path is None else os.path.abspath(os.path.expanduser(path))


def is_path(name: str) -> bool:
    """Whether a model's name is meant as a local path: ORG/NAME of the hub is not, unless such a directory exists."""
    return name.startswith((".", "/", "~")) or name.count("/") != 1 or Path(name).exists()


def _absolute_model(model: ModelConfig) -> ModelConfig:
    if model.source is WeightSource.pretrained and model.path is not None and is_path(model.path):
        return replace(model, path=_absolute(model.path))
    return model


def _absolute_models(stage: StageConfig) -> StageConfig:
    changed: dict[str, Any] = {}
    for entry in fields(stage):
        value = getattr(stage, entry.name)
        if isinstance(value, StageConfig):
            changed[entry.name] = _absolute_models(value)
        elif entry.name.endswith("_model") and isinstance(value, str):
            changed[entry.name] = _absolute(value)
        elif entry.name == "advantage":
            changed[entry.name] = _absolute_reference(value)
    return replace(stage, **changed)


def _absolute_reference(reference: str | None) -> str | None:
    """FILE.py:NAME with the file's whole path; MODULE:NAME as it is."""
    path, separator, name = (reference or "").rpartition(":")
    return f"{_absolute(path)}{separator}{name}" if path.endswith(".py") else reference
