"""What backends return, and how ranks that share a model's weights answer their prompts together."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlhf.batch import PromptBatch, Rollout
from rlhf.engine.distributed import RankGroup

Answer = Callable[[list[Int[Tensor, " _"]], Int[Tensor, " n"]], "list[Response]"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Response:
    """A response's tokens, its end included, the log-probability of each, and whether it ended before it had to.

    Log-probabilities are those under the temperature, of the whole distribution and without penalties: what training
    computes. None if the backend does not tell them.
    """

    ids: Int[Tensor, " R"]
    logprobs: Float[Tensor, " R"] | None
    ended: bool


def answer_together(
    prompts: PromptBatch, streams: Int[Tensor, " B"], answer: Answer, *, group: RankGroup | None, pad_id: int
) -> Rollout:
    """This rank's responses, from a function that answers the prompts of all ranks of a group.

    Args:
        prompts: this rank's.
        streams: the number of each prompt's stream of random numbers.
        answer: from prompts without padding, and their streams, to responses; called with the same on every rank.
        group: the ranks that share the weights; None for a rank alone.
        pad_id: what responses are padded with.
    """
    rows = [row[mask] for row, mask in zip(prompts.prompt_ids, prompts.prompt_mask, strict=True)]
    first, count = 0, len(rows)
    if group is not None:
        shared = group.gather_objects(([row.cpu() for row in rows], streams.cpu()))
        rows = [row for part, _ in shared for row in part]
        streams = torch.cat([part for _, part in shared])
        first = sum(len(part) for part, _ in shared[: group.rank])
    return _rollout(answer(rows, streams)[first : first + count], prompts, pad_id=pad_id)


def _rollout(responses: list[Response], prompts: PromptBatch, *, pad_id: int) -> Rollout:
    device = prompts.prompt_ids.device

    def padded(rows: list[Tensor], value: int | float) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value).to(device)

    ids = padded([response.ids for response in responses], pad_id)
    lengths = torch.tensor([len(response.ids) for response in responses], device=device)
    logprobs = [response.logprobs for response in responses if response.logprobs is not None]
    return Rollout(
        sequence_ids=torch.cat([prompts.prompt_ids, ids], dim=1),
        prompt_mask=prompts.prompt_mask,
        response_mask=torch.arange(ids.shape[1], device=device) < lengths.unsqueeze(1),
        ended=torch.tensor([response.ended for response in responses], device=device),
        sampled_logprobs=padded(logprobs, 0.0) if len(logprobs) == len(responses) else None,
    )
