"""What a row becomes, decoded from the batch that a stage is trained on: the loss stands in «»."""

from itertools import groupby
from typing import Any

from rlhf.config.schema import DataConfig, SourceConfig, SplitConfig
from rlhf.data.collate import collate_pairs, collate_sft
from rlhf.data.conversation import Refused
from rlhf.data.encode import Encoded, Encoder
from rlhf.data.formats import conversations


def encoded(tokenizer: Any, rows: list[Any], source: SourceConfig, *, stage: str = "sft", **options: Any) -> Encoded:
    """Rows through a format and the encoder, all of them for one stage; a bad row is an AssertionError."""
    split = SplitConfig(**{"sft": 0.0, "rm": 0.0, "ppo": 0.0, stage: 1.0}, held_out=0.0)
    data = DataConfig(sources={"main": source}, split=split, **options)
    found = []
    for entry in conversations([(f"row {number}", row) for number, row in enumerate(rows, 1)], source, name="main"):
        assert not isinstance(entry, Refused), entry.reason
        found.append(entry)
    return Encoder(data, tokenizer).encode(found)


def refusal(row: Any, source: SourceConfig) -> str:
    """Why a format refuses a row."""
    (entry,) = conversations([("here", row)], source, name="main")
    assert isinstance(entry, Refused), entry
    return entry.reason


def marked(tokenizer: Any, ids: list[int], mask: list[bool]) -> str:
    """Decoded ids, the masked ones in «»."""
    text = ""
    for is_target, run in groupby(zip(ids, mask, strict=True), key=lambda entry: entry[1]):
        own = str(tokenizer.decode([token for token, _ in run]))
        text += f"«{own}»" if is_target else own
    return text


def shown(tokenizer: Any, rows: list[Any], source: SourceConfig, *, stage: str = "sft", **options: Any) -> list[str]:
    """Each sequence of a stage's batch: of the reward model chosen and rejected, of PPO the prompts."""
    found = encoded(tokenizer, rows, source, stage=stage, **options).rows.get(f"{stage}_train", [])
    if not found:
        return []
    pad_id = tokenizer.pad_token_id
    if stage == "ppo":
        return [str(tokenizer.decode(row["prompt_ids"])) for row in found]
    if stage == "sft":
        batch = collate_sft(found, pad_id=pad_id)
        sides = [(batch.sequence_ids, batch.attention_mask, batch.loss_mask)]
    else:
        pairs = collate_pairs(found, pad_id=pad_id)
        sides = [
            (pairs.chosen_ids, pairs.chosen_mask, pairs.chosen_targets),
            (pairs.rejected_ids, pairs.rejected_mask, pairs.rejected_targets),
        ]
    return [
        marked(tokenizer, ids[real].tolist(), loss[real].tolist())
        for number in range(len(found))
        for ids, real, loss in [(side[0][number], side[1][number], side[2][number]) for side in sides]
    ]
