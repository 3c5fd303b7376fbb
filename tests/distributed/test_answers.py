"""What generates, under each ZeRO stage, adapted or not, and what it leaves behind."""

import gc
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from engines import SINGLE, STAGES, prompts_for, zero
from generators import BY_HF, DRAWN, GREEDY, answers, are_alike, generator_of, plain_engine, tokens, weights
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf.batch import PromptBatch
from rlhf.config.choices import RolloutBackend
from rlhf.config.errors import ConfigError
from rlhf.engine.build import build_engine
from rlhf.engine.distributed import all_reduce_max, all_reduce_sum, rank, world_size
from rlhf.models.lora import AdaptersOff
from rlhf.models.tokenizer import load_tokenizer
from rlhf.rollout.forward import response_logprobs
from rlhf.rollout.native import backend
from rlhf.rollout.native.library import NotCompiledError
from rlhf.rollout.sampling import Sampling


def ragged(folder: Path) -> PromptBatch:
    """This rank's prompts."""
    return prompts_for(load_tokenizer(folder / "policy"))


def uneven(folder: Path) -> PromptBatch:
    """This rank's prompts, of which the second rank has one less."""
    prompts = ragged(folder)
    return prompts.rows(slice(0, len(prompts) - rank()))


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.ranks(2)
def test_native_decoding_gives_the_tokens_of_transformers(folder: Path, stage: int, adapted: bool) -> None:
    engine, prompts = plain_engine(folder, zero(stage), adapted=adapted), ragged(folder)
    before, limit = weights(engine), len(load_tokenizer(folder / "policy"))
    native, wanted = answers(engine, prompts, folder, GREEDY), tokens(answers(engine, prompts, folder, BY_HF))
    assert int(native.response_mask.sum()) > 10
    assert tokens(native) == wanted
    with torch.no_grad():
        computed = response_logprobs(engine, native, temperature=1.0, vocab_limit=limit)
    assert native.sampled_logprobs is not None
    # Training computes what was sampled from.
    assert float((computed - native.sampled_logprobs).abs().max()) < 1e-4
    assert are_alike(before, weights(engine))  # Adapters are merged into a copy.
    if stage < 3:
        assert tokens(answers(engine, prompts, folder, replace(GREEDY, gather=False))) == wanted
        with patch.object(backend, "load_library", side_effect=NotCompiledError("no compiler")):
            generator = generator_of(engine, folder, GREEDY)
        assert "not compiled: no compiler" in generator.backend.description
        assert tokens(generator.generate(prompts)) == wanted
    del native, computed
    for sampling in (GREEDY, BY_HF):
        assert further_bytes(engine, prompts, folder, sampling) == 0
    if adapted:
        reference = AdaptersOff(engine)
        without = tokens(answers(reference, prompts, folder, GREEDY))
        assert without == tokens(answers(reference, prompts, folder, BY_HF))
        assert float(all_reduce_sum(torch.tensor(float(without != wanted)))) > 0


def further_bytes(engine: Any, prompts: PromptBatch, folder: Path, sampling: Sampling) -> int:
    """What tensors take more on any rank after a rollout than before it, when its cache is given back."""
    generator = generator_of(engine, folder, replace(sampling, release_cache=True))
    before = living_bytes()
    generator.generate(prompts)
    return int(all_reduce_max(torch.tensor(float(living_bytes() - before))))


def living_bytes() -> int:
    """The memory of all tensors of this process, each piece counted once."""
    gc.collect()
    pieces: dict[int, int] = {}
    for each in gc.get_objects():
        if issubclass(type(each), Tensor):
            storage = each.untyped_storage()
            pieces[storage.data_ptr()] = max(storage.nbytes(), pieces.get(storage.data_ptr(), 0))
    return sum(pieces.values())


@pytest.mark.ranks(2)
def test_layer_by_layer_generation_gives_the_same_answers(folder: Path) -> None:
    engine, prompts = plain_engine(folder, zero(3)), uneven(folder)
    whole, layerwise = (answers(engine, prompts, folder, replace(BY_HF, gather=gather)) for gather in (True, False))
    assert int(whole.response_mask.sum()) > 10
    # Native decoding is not chosen for a policy that does not fit whole, and its ranks need not keep in step.
    assert tokens(whole) == tokens(layerwise) == tokens(answers(engine, prompts, folder, GREEDY))
    too_large = replace(GREEDY, gather=False)
    assert not generator_of(engine, folder, too_large).native
    with pytest.raises(ConfigError, match=r"rollout\.gather=true makes one"):
        generator_of(engine, folder, replace(too_large, backend=RolloutBackend.native))


@pytest.mark.parametrize(("stage", "adapted"), [(0, False), (3, False), (3, True)])
@pytest.mark.ranks(2)
def test_ranks_that_share_the_weights_give_the_same_tokens(folder: Path, stage: int, adapted: bool) -> None:
    engine, prompts = plain_engine(folder, zero(stage), adapted=adapted), uneven(folder)
    parallel = replace(GREEDY, tensor_parallel=2, gather=False)
    streams = torch.arange(len(prompts)) + 10 * rank()
    divided, whole, slow = (
        answers(engine, prompts, folder, sampling, streams=streams)
        for sampling in (parallel, GREEDY, replace(parallel, backend=RolloutBackend.hf))
    )
    assert int(divided.response_mask.sum()) > 10
    assert tokens(divided) == tokens(whole) == tokens(slow)
    drawn, drawn_whole = (
        answers(engine, prompts, folder, replace(sampling, temperature=1.0), seed=5, streams=streams)
        for sampling in (parallel, GREEDY)
    )
    assert tokens(drawn) == tokens(drawn_whole)
    assert divided.sampled_logprobs is not None and whole.sampled_logprobs is not None
    assert float((divided.sampled_logprobs - whole.sampled_logprobs).abs().max()) < 1e-5


def gathered(prompts: PromptBatch) -> PromptBatch:
    """The prompts of all ranks."""
    count = len(prompts)
    ids = torch.zeros(count * world_size(), prompts.prompt_ids.shape[1], dtype=torch.long)
    mask = torch.zeros_like(ids)
    ids[rank() * count : (rank() + 1) * count] = prompts.prompt_ids
    mask[rank() * count : (rank() + 1) * count] = prompts.prompt_mask.long()
    return PromptBatch(prompt_ids=all_reduce_sum(ids), prompt_mask=all_reduce_sum(mask).bool())


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.ranks(2)
def test_a_response_depends_on_its_own_stream_alone(folder: Path, stage: int) -> None:
    engine, prompts = plain_engine(folder, zero(stage)), ragged(folder)
    count, everything = len(prompts), gathered(prompts)
    streams, mine = torch.arange(len(everything)), slice(rank() * count, (rank() + 1) * count)
    own = answers(engine, everything.rows(mine), folder, DRAWN, seed=5, streams=streams[mine])
    # All prompts on this rank, in other batches.
    whole = tokens(answers(engine, everything, folder, replace(DRAWN, batch_size=None), seed=5, streams=streams))
    assert tokens(own) == whole[mine]
    assert tokens(answers(engine, everything, folder, DRAWN, seed=6, streams=streams)) != whole
    assert len({tuple(row) for row in whole}) > len(everything) // 2


@pytest.mark.ranks(2)
def test_texts_end_responses_and_the_cache_is_given_back(folder: Path) -> None:
    engine, tokenizer, prompts = plain_engine(folder, zero(3)), load_tokenizer(folder / "policy"), ragged(folder)
    free = tokens(answers(engine, prompts, folder, GREEDY))
    text = tokenizer.decode(free[0][3:5])
    # The prompt and the beginning of the response read like this: it ends nothing.
    across = tokenizer.decode([int(prompts.prompt_ids[1, -1]), free[1][0]])
    stopped, slow = (
        answers(engine, prompts, folder, replace(sampling, stop=(text, across))) for sampling in (GREEDY, BY_HF)
    )
    assert tokens(stopped) == tokens(slow)
    assert stopped.ended is not None and slow.ended is not None and torch.equal(stopped.ended, slow.ended)
    first = tokens(stopped)[0]
    assert first == free[0][: len(first)] and bool(stopped.ended[0])
    assert len(first) <= 5 < len(free[0])
    generator = generator_of(engine, folder, replace(GREEDY, release_cache=False))
    native: Any = generator.backend
    generator.generate(prompts)
    assert native.arena.nbytes > 0
    with suppress(KeyError), generator.generation_mode():
        raise KeyError
    assert native.arena.nbytes == 0
    assert tokens(generator.generate(prompts)) == free


@pytest.mark.ranks(2)
def test_a_family_that_is_not_known_is_answered_by_transformers(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "policy")
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    engine = build_engine(GPT2LMHeadModel(GPT2Config(**sizes, **ends)), SINGLE, memory=zero(3), ranks=world_size())
    generator = generator_of(engine, folder, replace(GREEDY, tensor_parallel=2, gather=False))
    said = generator.backend.description
    assert "does not do it for" in said and said.endswith("rollout.tensor_parallel=2 does nothing)")
    wanted = tokens(generator_of(engine, folder, BY_HF).generate(ragged(folder)))
    assert tokens(generator.generate(ragged(folder))) == wanted and len(wanted[0]) > 1


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.ranks(2)
def test_a_cache_that_does_not_fit_is_refused_by_all_ranks_that_decode_together(folder: Path, together: int) -> None:
    engine, prompts = plain_engine(folder, zero(3)), ragged(folder)
    generator = generator_of(engine, folder, replace(GREEDY, tensor_parallel=together, gather=together == 1))
    refused = ""
    with patch.object(backend, "free_bytes", lambda device: 2**30 * (1 - rank())):  # The second rank has no room.
        try:
            generator.generate(prompts)
        except ConfigError as error:
            refused = str(error)
    assert ("at most 50% of the 0.00 MiB that are free may be taken: lower" in refused) == (
        rank() == 1 or together == 2
    )
    assert tokens(generator.generate(prompts)), "it works again once there is room"
