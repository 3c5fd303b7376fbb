"""RLHF on DeepSpeed: supervised fine-tuning, reward models and PPO, composed from YAML."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf.stages.ppo.engine import DeepSpeedRLHFEngine
    from rlhf.stages.ppo.trainer import DeepSpeedPPOTrainer

__version__ = "0.1.0"
__all__ = ["DeepSpeedPPOTrainer", "DeepSpeedRLHFEngine", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the public classes when they are asked for: launch.py uses this package without torch."""
    if name == "DeepSpeedRLHFEngine":
        from rlhf.stages.ppo.engine import DeepSpeedRLHFEngine

        return DeepSpeedRLHFEngine
    if name == "DeepSpeedPPOTrainer":
        from rlhf.stages.ppo.trainer import DeepSpeedPPOTrainer

        return DeepSpeedPPOTrainer
    raise AttributeError(f"module 'rlhf' has no attribute {name!r}")
