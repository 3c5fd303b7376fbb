"""What this machine has, and a configuration made concrete for it. Imports no torch."""

import importlib.util
import os
import re
import subprocess
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from rlhf.config.schema import Accelerator, Config, MemoryConfig, ModelConfig, Precision, StageConfig, WeightSource

CPU_RANKS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Cores that this process may use, indices of the GPUs that torch can use, and whether they compute in bf16."""

    cores: int
    gpus: tuple[int, ...]
    cpu_bf16: bool
    gpu_bf16: bool


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


def visible_gpus() -> dict[int, float]:
    """Index → compute capability of the GPUs that `nvidia-smi` lists and CUDA_VISIBLE_DEVICES leaves, in its order."""
    command = ["nvidia-smi", "--query-gpu=index,uuid,compute_cap", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
        rows = [[cell.strip() for cell in line.split(",")] for line in listed if line.strip()]
        gpus = {int(index): float(capability) for index, _, capability in rows}
    except (OSError, subprocess.SubprocessError, ValueError):
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return gpus
    named = {index: int(index) for index, _, _ in rows} | {uuid: int(index) for index, uuid, _ in rows}
    chosen: dict[int, float] = {}
    for entry in (part.strip() for part in visible.split(",")):
        if entry not in named:
            break  # CUDA itself ignores everything from the first invalid entry on.
        chosen[named[entry]] = gpus[named[entry]]
    return chosen


def torch_has_cuda() -> bool:
    """Whether the installed torch is a CUDA build, read from its version file."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    version = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    return re.search(r"^cuda\b[^=]*=\s*['\"]", version, flags=re.MULTILINE) is not None


def detect() -> Machine:
    """Look at this machine."""
    gpus = visible_gpus() if torch_has_cuda() else {}
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        cpuinfo = ""
    return Machine(
        cores=usable_cores(),
        gpus=tuple(gpus),
        cpu_bf16=cpu_computes_bf16(cpuinfo),
        gpu_bf16=bool(gpus) and min(gpus.values()) >= 8.0,
    )


def resolve(config: Config, machine: Machine) -> Config:
    """Return the configuration with everything automatic decided, so that it says what will run.

    Fills in the accelerator, ranks and threads, the precision, and the reward model where it is the same as the
    model; makes paths absolute.
    """
    hardware = config.hardware
    accelerator = hardware.accelerator
    if accelerator is Accelerator.auto:
        accelerator = Accelerator.cuda if machine.gpus else Accelerator.cpu
    on_gpu = accelerator is Accelerator.cuda
    ranks = hardware.gpus_per_node
    if ranks is None:
        ranks = len(machine.gpus) if on_gpu else CPU_RANKS
    threads = hardware.threads_per_rank or max(1, machine.cores // max(1, ranks))
    model = _absolute_model(config.model)
    reward_model = model if config.reward_model == ModelConfig() else _absolute_model(config.reward_model)
    sources = {name: replace(s, path=_absolute(s.path)) for name, s in config.data.sources.items()}
    return replace(
        config,
        stage=_absolute_models(config.stage),
        model=model,
        reward_model=reward_model,
        data=replace(config.data, sources=sources),
        hardware=replace(hardware, accelerator=accelerator, gpus_per_node=ranks, threads_per_rank=threads),
        memory=_precision(config.memory, machine, on_gpu=on_gpu),
        run_dir=_absolute(config.run_dir),
        cache_dir=_absolute(config.cache_dir),
    )


def _precision(memory: MemoryConfig, machine: Machine, *, on_gpu: bool) -> MemoryConfig:
    if memory.precision is not Precision.auto:
        return memory
    has_bf16 = machine.gpu_bf16 if on_gpu else machine.cpu_bf16
    fallback = Precision.fp16 if on_gpu else Precision.fp32
    return replace(memory, precision=Precision.bf16 if has_bf16 else fallback)


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
    return replace(stage, **changed)
