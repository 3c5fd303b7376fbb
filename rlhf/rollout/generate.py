"""Sampling responses with transformers' generate."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from rlhf.batch import PromptBatch, Rollout
from rlhf.config.errors import ConfigError
from rlhf.engine.distributed import all_reduce_max
from rlhf.engine.generation import generation_mode, is_partitioned
from rlhf.functional.masking import response_mask_from_ids


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How tokens are drawn. A temperature of 0 means greedy decoding.

    `batch_size` prompts are answered together (None: all). `gather` says whether a ZeRO-3 model is gathered whole.
    """

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    batch_size: int | None
    gather: bool = True


def generate(
    engine: Any, prompts: PromptBatch, *, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, vocab_limit: int
) -> Rollout:
    """Sample one response per prompt with the engine's present weights. Every rank must call.

    Args:
        engine: the actor's or the reference's engine, any ZeRO stage.
        prompts: left-padded prompts.
        tokenizer: gives EOS, at which a response ends, and PAD, with which the batch is filled up.
        sampling: temperature, truncation of the distribution, longest response.
        vocab_limit: ids from here on are never sampled.

    Returns:
        A rollout whose responses are padded to the longest one on this rank (R >= 1).
    """
    _check_length(engine.module.config, prompts.prompt_ids.shape[1], sampling.max_new_tokens)
    settings = _generation_config(tokenizer, sampling, vocab_size=engine.module.config.vocab_size, limit=vocab_limit)
    synced = not sampling.gather and is_partitioned(engine)
    pieces = prompts.split(sampling.batch_size or len(prompts))
    rounds = _most_of_any_rank(len(pieces), engine.device) if synced else len(pieces)
    with generation_mode(engine, gather=sampling.gather) as model, torch.no_grad():
        # Where all ranks have to take part in every step, one with fewer pieces answers its last one again.
        parts = [
            _generate_part(model, pieces[min(index, len(pieces) - 1)], settings, synced=synced)
            for index in range(rounds)
        ][: len(pieces)]
    width = prompts.prompt_ids.shape[1]
    longest = max(part.shape[1] for part in parts)
    pad_id = int(tokenizer.pad_token_id)
    sequences = torch.cat([torch.nn.functional.pad(part, (0, longest - part.shape[1]), value=pad_id) for part in parts])
    lengths = torch.cat([torch.full((len(part),), part.shape[1] - width, device=part.device) for part in parts])
    mask = response_mask_from_ids(sequences[:, width:], eos_id=int(tokenizer.eos_token_id))
    generated = torch.arange(longest - width, device=sequences.device) < lengths.unsqueeze(1)
    return Rollout(sequence_ids=sequences, prompt_mask=prompts.prompt_mask, response_mask=mask & generated)


def _check_length(config: Any, prompt_length: int, max_new_tokens: int) -> None:
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and prompt_length + max_new_tokens > positions:
        raise ConfigError(
            f"a prompt of {prompt_length} tokens and rollout.max_new_tokens={max_new_tokens} (null: "
            f"data.max_response_length) take more than the model's {positions} positions: lower one of them"
        )


def _most_of_any_rank(count: int, device: torch.device) -> int:
    return int(all_reduce_max(torch.tensor([count], device=device)))


def _generate_part(model: Any, part: PromptBatch, settings: GenerationConfig, *, synced: bool) -> torch.Tensor:
    sequences: torch.Tensor = model.generate(
        input_ids=part.prompt_ids,
        attention_mask=part.prompt_mask.long(),
        generation_config=settings,
        synced_gpus=synced,
    )
    return sequences


def _generation_config(
    tokenizer: PreTrainedTokenizerBase, sampling: Sampling, *, vocab_size: int, limit: int
) -> GenerationConfig:
    greedy = sampling.temperature == 0.0
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=not greedy,
        temperature=None if greedy else sampling.temperature,
        top_p=None if greedy else sampling.top_p,
        top_k=None if greedy else sampling.top_k,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        suppress_tokens=list(range(limit, vocab_size)) or None,
        use_cache=True,
    )
