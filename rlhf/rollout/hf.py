"""Generation with transformers' own `generate`: it answers for every model, slowly, and is what others are held to."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from rlhf.batch import PromptBatch, Rollout
from rlhf.engine.distributed import all_reduce_max
from rlhf.engine.generation import generation_mode, is_partitioned
from rlhf.functional.masking import response_mask_from_ids
from rlhf.rollout.sampling import Sampling, end_of_text


class HfBackend:
    """The engine's module itself, in generation mode. Random numbers are torch's.

    Args:
        engine: whose weights generate.
        tokenizer: gives EOS and PAD, and the texts of tokens.
        sampling: how tokens are drawn.
        vocab_limit: ids from here on are never sampled.
        reason: why this way was taken, in words.
    """

    def __init__(
        self,
        engine: Any,
        *,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        vocab_limit: int,
        reason: str,
    ) -> None:
        self.engine, self.tokenizer, self.sampling, self.vocab_limit = engine, tokenizer, sampling, vocab_limit
        self.description = f"transformers' generate ({reason})"

    def mode(self) -> AbstractContextManager[Any]:
        """The module, gathered if it is partitioned and fits whole."""
        return generation_mode(self.engine, gather=self.sampling.whole)

    def release(self) -> None:
        """There is nothing to give back."""

    def generate(self, prompts: PromptBatch, *, seed: int, streams: Int[Tensor, " B"]) -> Rollout:
        """Answer left-padded prompts, within `mode`."""
        model, sampling = self.engine.module, self.sampling
        # Layers that are gathered one by one need all ranks in every step.
        in_step = not sampling.whole and is_partitioned(self.engine)
        settings = _settings(self.tokenizer, sampling, vocab_size=model.config.vocab_size, limit=self.vocab_limit)
        ends = _EndOfText(self.tokenizer, sampling, width=prompts.prompt_ids.shape[1])
        pieces = prompts.split(sampling.batch_size or len(prompts))
        device = prompts.prompt_ids.device
        rounds = int(all_reduce_max(torch.tensor([len(pieces)], device=device))) if in_step else len(pieces)
        with torch.no_grad():
            # One with fewer pieces answers its last one again.
            parts = [
                model.generate(
                    input_ids=piece.prompt_ids,
                    attention_mask=piece.prompt_mask.long(),
                    generation_config=settings,
                    synced_gpus=in_step,
                    stopping_criteria=StoppingCriteriaList([ends]) if sampling.stop else None,
                )
                for piece in (pieces[min(index, len(pieces) - 1)] for index in range(rounds))
            ][: len(pieces)]
        return _rollout(parts, prompts, tokenizer=self.tokenizer, sampling=sampling)


class _EndOfText(StoppingCriteria):
    """Whether the response, without its prompt, contains a text that ends it; transformers' own looks at both."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, *, width: int) -> None:
        self.tokenizer, self.sampling, self.width = tokenizer, sampling, width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **options: Any) -> torch.Tensor:
        """True for each row that has ended."""
        ended = [
            end_of_text(self.tokenizer, self.sampling.stop, row[self.width :]) is not None for row in input_ids.tolist()
        ]
        return torch.tensor(ended, device=input_ids.device)


def _rollout(
    parts: list[torch.Tensor], prompts: PromptBatch, *, tokenizer: PreTrainedTokenizerBase, sampling: Sampling
) -> Rollout:
    width, pad_id = prompts.prompt_ids.shape[1], int(tokenizer.pad_token_id)
    longest = max(part.shape[1] for part in parts)
    sequences = torch.cat([torch.nn.functional.pad(part, (0, longest - part.shape[1]), value=pad_id) for part in parts])
    lengths = torch.cat([torch.full((len(part),), part.shape[1] - width, device=part.device) for part in parts])
    responses = sequences[:, width:]
    mask = torch.arange(longest - width, device=sequences.device) < lengths.unsqueeze(1)
    ended = torch.zeros_like(mask[:, 0])
    for stop_id in sampling.stop_ids:
        mask &= response_mask_from_ids(responses, eos_id=stop_id)
        ended |= ((responses == stop_id) & mask).any(dim=1)
    if sampling.stop:
        for row, ids in enumerate(responses.tolist()):
            length = end_of_text(tokenizer, sampling.stop, ids[: int(mask[row].sum())])
            if length is not None:
                mask[row, length:] = False
                ended[row] = True
    return Rollout(sequence_ids=sequences, prompt_mask=prompts.prompt_mask, response_mask=mask, ended=ended)


def _settings(
    tokenizer: PreTrainedTokenizerBase, sampling: Sampling, *, vocab_size: int, limit: int
) -> GenerationConfig:
    drawn = (
        {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p or None,
        }
        if sampling.temperature > 0.0
        else {"do_sample": False}
    )
    return GenerationConfig(
        **drawn,
        max_new_tokens=sampling.max_new_tokens,
        min_new_tokens=sampling.min_new_tokens or None,
        repetition_penalty=sampling.repetition_penalty,
        eos_token_id=list(sampling.stop_ids),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        suppress_tokens=list(range(limit, vocab_size)) or None,
        use_cache=True,
    )
