"""RLHF on DeepSpeed: supervised fine-tuning, reward models and PPO, composed from YAML."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf.config.schema import Config as Config
    from rlhf.config.schema import MemoryConfig as MemoryConfig
    from rlhf.config.schema import Precision as Precision
    from rlhf.config.schema import RolloutConfig as RolloutConfig
    from rlhf.config.schema import ScorerConfig as ScorerConfig
    from rlhf.rollout.advantages import Signals as Signals
    from rlhf.rollout.prompts import prompt_batch as prompt_batch
    from rlhf.rollout.reward import score as score
    from rlhf.stages.ppo.config import PPOConfig as PPOConfig
    from rlhf.stages.ppo.engine import DeepSpeedRLHFEngine as DeepSpeedRLHFEngine
    from rlhf.stages.ppo.trainer import DeepSpeedPPOTrainer as DeepSpeedPPOTrainer

__version__ = "0.1.0"
_PUBLIC = {
    "Config": "rlhf.config.schema",
    "DeepSpeedPPOTrainer": "rlhf.stages.ppo.trainer",
    "DeepSpeedRLHFEngine": "rlhf.stages.ppo.engine",
    "MemoryConfig": "rlhf.config.schema",
    "PPOConfig": "rlhf.stages.ppo.config",
    "Precision": "rlhf.config.schema",
    "RolloutConfig": "rlhf.config.schema",
    "ScorerConfig": "rlhf.config.schema",
    "Signals": "rlhf.rollout.advantages",
    "prompt_batch": "rlhf.rollout.prompts",
    "score": "rlhf.rollout.reward",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    """Import what is public when it is asked for: launch.py uses this package without torch."""
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'rlhf' has no attribute {name!r}")
