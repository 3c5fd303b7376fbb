"""A reward model's scores of whole conversations: the public `rlhf.score`."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf.config.errors import ConfigError
from rlhf.config.storage import default_cache
from rlhf.data.collate import pad
from rlhf.data.messages import BadRow, message
from rlhf.models.door import check_tokenizer
from rlhf.models.load import ScalarModel, has_scalar_head, load_scalar_model
from rlhf.models.score_rule import read_score_rule
from rlhf.models.targets import encode_answer
from rlhf.models.tokenizer import encode_prompt, load_tokenizer
from rlhf.rollout.forward import sequence_scores


def score(
    directory: str | Path,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    *,
    normalize: bool = True,
    batch_size: int = 8,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[float]:
    """The scores of conversations' last answers, read where training reads them.

    Args:
        directory: of a reward model that stage=rm has written, or that `transformers` loads.
        conversations: each a list of {"role", "content"}; the last message is the assistant's.
        normalize: subtract `score_mean` and divide by `score_std` of the model's config.json.
        batch_size: conversations in one forward pass.
        device: where to compute.
        dtype: the format of the computing weights.

    Returns:
        One number for each conversation, in their order.

    Raises:
        ConfigError: no reward model, or a damaged one; no numbers to normalise by, or those of other weights; a
            conversation without an answer at its end, or longer than the model's positions.
        DataError: a conversation on which the chat template does not come to an end.
    """
    path = Path(directory)
    if not os.path.isdir(path):
        raise ConfigError(f"there is no directory {path}: give that of a reward model, as in RUN/rm/model")
    if not has_scalar_head(path):
        raise ConfigError(f"{path} is not a reward model: train one with stage=rm and give its directory")
    check_tokenizer(path, cache_dir=default_cache())
    tokenizer = load_tokenizer(path)
    rule = read_score_rule(path, tokenizer, normalize=normalize)
    sequences = _encoded(conversations, tokenizer, tail=rule.tail)
    model = load_scalar_model(path, tokenizer, dtype=dtype, attention="sdpa").eval().to(device)
    _check_lengths(sequences, model)
    order = sorted(range(len(sequences)), key=lambda number: len(sequences[number]))
    scores = [0.0] * len(sequences)
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        ids, mask = pad([sequences[number] for number in numbers], pad_id=int(tokenizer.pad_token_id or 0))
        with torch.no_grad():
            raw = sequence_scores(model, ids.to(device), mask.to(device)).tolist()
        for number, value in zip(numbers, raw, strict=True):
            if not math.isfinite(value):
                raise ConfigError(f"{path}: conversation {number + 1} has the score {value}: the weights are damaged")
            scores[number] = (value - rule.mean) / rule.std
    return scores


def _encoded(conversations: Sequence[Any], tokenizer: Any, *, tail: Sequence[int]) -> list[list[int]]:
    found = []
    for number, messages in enumerate(conversations, start=1):
        try:
            turns = [message(one, f"message {place}") for place, one in enumerate(messages, start=1)]
        except BadRow as bad:
            raise ConfigError(f"conversation {number}: {bad}") from None
        if len(turns) < 2 or turns[-1].role != "assistant":
            raise ConfigError(
                f"conversation {number} does not end with an answer: its last message must be the assistant's, and a "
                "prompt must stand before it"
            )
        *prompt, answer = turns
        found.append([*encode_prompt(tokenizer, prompt), *encode_answer(tokenizer, prompt, answer), *tail])
    return found


def _check_lengths(sequences: Sequence[Sequence[int]], model: ScalarModel) -> None:
    limit = getattr(model.classifier.config, "max_position_embeddings", None)
    for number, sequence in enumerate(sequences, start=1):
        if isinstance(limit, int) and len(sequence) > limit:
            raise ConfigError(f"conversation {number} has {len(sequence)} tokens, but the model {limit} positions")
