"""To which stage a prompt belongs, and whether it is held out.

The answer depends on the prompt and the seed alone: the same prompt in two sources is in one part, added rows move
no other row, and no prompt is trained on in two stages, or both trained on and held out. The held-out prompts are those
of every stage's evaluation.
"""

import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf.config.schema import SplitConfig
from rlhf.data.conversation import Conversation, Message

STAGES = ("sft", "rm", "ppo")
# Plain texts, which have no prompt: PPO's pretraining mix.
PTX = "ptx"


@dataclass(frozen=True, slots=True)
class Part:
    """One stage's training or held-out rows."""

    stage: str
    held_out: bool

    @property
    def label(self) -> str:
        """The part's name in files and counts: sft_train, sft_held_out, …"""
        return f"{self.stage}_{'held_out' if self.held_out else 'train'}"


ALL_PARTS = tuple(Part(stage, held_out) for stage in (*STAGES, PTX) for held_out in (False, True))


def uniform(text: str) -> float:
    """A number in [0, 1) that a hash makes of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def canonical(messages: Sequence[Message]) -> list[tuple[str, ...]]:
    """Turns as they are compared: white space around them and Unicode's forms do not tell two prompts apart."""

    def turn(one: Message) -> tuple[str, ...]:
        said = (one.role, unicodedata.normalize("NFC", one.content.strip()))
        return (*said, one.fields) if one.fields else said

    return [turn(one) for one in messages]


def assign(messages: tuple[Message, ...], split: SplitConfig, *, stages: Sequence[str] = ()) -> Part:
    """The part of a prompt: stages in proportion to split.sft, .rm and .ppo, and split.held_out of each held out.

    `stages` limits the choice: a prompt that would be in another stage is put into one of them.
    """
    prompt = json.dumps(canonical(messages))
    held_out = uniform(f"held out {split.seed} {prompt}") < split.held_out
    shares = {stage: float(getattr(split, stage)) for stage in STAGES}
    stage = _drawn(f"stage {split.seed} {prompt}", shares)
    if stages and stage not in stages:
        allowed = {name: shares[name] for name in STAGES if name in stages}
        stage = _drawn(
            f"among {split.seed} {prompt}", allowed if any(allowed.values()) else dict.fromkeys(allowed, 1.0)
        )
    return Part(stage, held_out)


def _drawn(text: str, shares: Mapping[str, float]) -> str:
    point = uniform(text) * sum(shares.values())
    total = 0.0
    for stage, share in shares.items():
        total += share
        if point < total:
            return stage
    # Rounding may leave the point on the very end: the last stage with a share takes it.
    return [stage for stage, share in shares.items() if share > 0][-1]


def part_of(conversation: Conversation, split: SplitConfig, *, stages: Sequence[str] = ()) -> Part:
    """The part of a conversation by its prompt; of a plain text by the text."""
    if conversation.messages:
        return assign(conversation.messages, split, stages=stages)
    return Part(PTX, uniform(f"held out {split.seed} {conversation.chosen}") < split.held_out)
