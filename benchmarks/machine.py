"""The processor that figures were measured on: its kind decides them more than its number of cores."""

import os
import platform
from pathlib import Path

# What kernels are chosen by, as /proc/cpuinfo has it.
_INSTRUCTIONS = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX-512 bf16", "amx_tile": "AMX"}


def processor(cpuinfo: str | None = None) -> str:
    """The cores and the kind of this machine, as in "2 CPU cores (Intel(R) Xeon(R) Processor; AVX2, AVX-512)"."""
    path = Path("/proc/cpuinfo")
    text = (path.read_text(encoding="utf-8") if path.is_file() else "") if cpuinfo is None else cpuinfo
    entries = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    known = {name.strip(): value.strip() for name, value in entries.items()}
    flags = known.get("flags", "").split()
    kind = known.get("model name", platform.machine())
    listed = ", ".join(name for flag, name in _INSTRUCTIONS.items() if flag in flags)
    return f"{os.cpu_count()} CPU cores ({kind}{'; ' if listed else ''}{listed})"
