"""To which stage a prompt belongs, and whether it is held out.

The answer depends on the prompt and the seed alone: the same prompt in two sources is in one part, added rows move
no other row, and no prompt is in two stages or in both training and evaluation.
"""

import hashlib
import json
from dataclasses import dataclass

from rlhf.config.schema import SplitConfig
from rlhf.data.conversation import Message

STAGES = ("sft", "rm", "ppo")


@dataclass(frozen=True, slots=True)
class Part:
    """One stage's training or held-out rows."""

    stage: str
    held_out: bool

    @property
    def label(self) -> str:
        """The part's name in files and counts: sft_train, sft_held_out, …"""
        return f"{self.stage}_{'held_out' if self.held_out else 'train'}"


ALL_PARTS = tuple(Part(stage, held_out) for stage in STAGES for held_out in (False, True))


def uniform(text: str) -> float:
    """A number in [0, 1) that a hash makes of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def assign(messages: tuple[Message, ...], split: SplitConfig) -> Part:
    """The part of a prompt: stages in proportion to split.sft, .rm and .ppo, and split.held_out of each held out."""
    prompt = json.dumps([(message.role, message.content) for message in messages])
    shares = [split.sft, split.rm, split.ppo]
    point = uniform(f"stage {split.seed} {prompt}") * sum(shares)
    held_out = uniform(f"held out {split.seed} {prompt}") < split.held_out
    total = 0.0
    for stage, share in zip(STAGES, shares, strict=True):
        total += share
        if point < total:
            return Part(stage, held_out)
    # Rounding may leave the point on the very end: the last stage with a share takes it.
    return Part([stage for stage, share in zip(STAGES, shares, strict=True) if share > 0][-1], held_out)
