"""Native decoding against transformers' generate, model family by model family, and what it does beyond it."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from decoders import (
    EOS,
    GROUPED,
    MODELS,
    SIZE,
    adapt,
    decoded,
    expected,
    model_of,
    prompts,
    replace_range,
    tokens,
    weights_of,
)
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from rlhf.models.decoder.layers import Norm
from rlhf.models.decoder.parts import UnsupportedModelError, decoder_parts
from rlhf.models.decoder.weights import Share, generation_weights
from rlhf.rollout.native.arena import Arena
from rlhf.rollout.native.forward import Decoder
from rlhf.rollout.native.graphs import StepGraphs
from rlhf.rollout.native.loop import Batch
from rlhf.rollout.responses import Response
from rlhf.rollout.sampling import Sampling


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_those_of_transformers(name: str) -> None:
    model, rows = model_of(name), prompts()
    wanted = expected(model, rows)
    # All at once from a copy of the weights, and with prompts that wait for a place from the weights themselves.
    for slots, own in ((8, True), (3, False)):
        found = decoded(model, rows, slots=slots, own=own)
        assert tokens(found) == wanted
        assert [response.ended for response in found] == [row[-1] == EOS for row in wanted]
        for row, response in zip(rows, found, strict=True):
            with torch.no_grad():
                logits = model(torch.cat([row, response.ids]).unsqueeze(0)).logits[0, len(row) - 1 : -1]
            computed = logits.log_softmax(dim=1).gather(1, response.ids.unsqueeze(1)).squeeze(1)
            torch.testing.assert_close(response.logprobs, computed, atol=1e-4, rtol=0)
    assert tokens(decoded(model, rows[:1])) == wanted[:1]  # A batch of one.


def test_some_of_these_responses_end_early_and_some_are_as_long_as_they_may_be() -> None:
    lengths = [len(row) for name in MODELS for row in tokens(decoded(model_of(name), prompts()))]
    assert sum(length < 40 for length in lengths) > 10
    assert sum(length == 40 for length in lengths) > 10


def test_a_response_does_not_depend_on_its_neighbours() -> None:
    model, rows = model_of("llama"), prompts()
    together = tokens(decoded(model, rows, temperature=1.0, seed=3))
    crowded = tokens(decoded(model, rows, temperature=1.0, seed=3, slots=2))
    alone = [
        tokens(decoded(model, [row], temperature=1.0, seed=3, streams=torch.tensor([index])))[0]
        for index, row in enumerate(rows)
    ]
    assert together == crowded == alone
    assert tokens(decoded(model, rows, temperature=1.0, seed=4)) != together


def test_sampling_follows_the_models_distribution() -> None:
    model, row = model_of("pythia"), prompts((5,))[0]
    with torch.no_grad():
        shares = (model(row.unsqueeze(0)).logits[0, -1] / 1.5).softmax(dim=0)
    count = 6000
    drawn = decoded(model, [row] * count, slots=count, temperature=1.5, max_new_tokens=1, seed=11)
    seen = torch.bincount(torch.tensor(tokens(drawn)).flatten(), minlength=SIZE)
    rare = shares * count < 5
    observed = torch.cat([seen[~rare], seen[rare].sum().view(1)]).float()
    wanted = torch.cat([shares[~rare], shares[rare].sum().view(1)]) * count
    freedom = len(wanted) - 1
    assert freedom > 20
    chi_square = float(((observed - wanted).square() / wanted).sum())
    assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5
    logprobs = torch.cat([response.logprobs for response in drawn])
    torch.testing.assert_close(logprobs.exp(), shares[torch.tensor(tokens(drawn)).flatten()], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    "options", [{"repetition_penalty": 1.4}, {"min_new_tokens": 25}, {"repetition_penalty": 0.8, "min_new_tokens": 7}]
)
def test_penalties_and_shortest_responses_are_those_of_transformers(options: dict[str, Any]) -> None:
    for name in ("opt", "qwen3", "pythia"):
        model, rows = model_of(name), prompts((7,) * 6)  # Equal lengths: transformers penalises padding, too.
        assert tokens(decoded(model, rows, slots=4, **options)) == expected(model, rows, **options)


def test_cut_distributions_draw_nothing_outside() -> None:
    model, rows = model_of("llama"), prompts()
    greedy = tokens(decoded(model, rows))
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert tokens(decoded(model, rows, temperature=1.0, **options)) == greedy
    whole = decoded(model, rows, temperature=1.0, seed=2)
    cut = decoded(model, rows, temperature=1.0, seed=2, top_k=3)
    assert tokens(whole) != tokens(cut)
    # Log-probabilities are those of the whole distribution, whatever was left out.
    for row, response in zip(rows, cut, strict=True):
        with torch.no_grad():
            logits = model(torch.cat([row, response.ids]).unsqueeze(0)).logits[0, len(row) - 1 : -1]
        computed = logits.log_softmax(dim=1).gather(1, response.ids.unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(response.logprobs, computed, atol=1e-4, rtol=0)


def test_several_stop_tokens_and_texts_end_a_response() -> None:
    model, rows = model_of("opt"), prompts()
    free = tokens(decoded(model, rows, stop_ids=()))
    stops = {row[4] for row in free}
    ended = decoded(model, rows, stop_ids=tuple(stops))
    for row, response in zip(free, ended, strict=True):
        first = min(row.index(stop) for stop in stops if stop in row)
        assert response.ids.tolist() == row[: first + 1]
        assert response.ended
    pair = free[0][2:4]

    def end(ids: list[int]) -> int | None:
        places = [place for place in range(len(ids) - 1) if ids[place : place + 2] == pair]
        return places[0] + 2 if places else None

    by_text = decoded(model, rows, stop_ids=(), stops=end)
    assert tokens(by_text) == [row[: end(row) or len(row)] for row in free]
    assert by_text[0].ended


def test_a_cache_is_reused_if_it_is_large_enough() -> None:
    weights = weights_of(model_of("llama"))
    arena = Arena()
    arena.fit(weights, slots=4, length=20)
    first = arena.layers[0].data_ptr()
    assert arena.nbytes == 2 * 2 * 4 * 2 * 20 * 16 * 4
    arena.fit(weights, slots=3, length=12)
    assert arena.layers[0].data_ptr() == first
    arena.fit(weights, slots=5, length=20)
    assert arena.slots == 5
    arena.release()
    assert arena.nbytes == 0


def test_a_rollout_in_a_larger_cache_is_the_same() -> None:
    model, rows = model_of("bloom"), prompts()
    weights = weights_of(model)
    arena = Arena()
    arena.fit(weights, slots=20, length=110)
    settings = Sampling(temperature=0.0, stop_ids=(EOS,), max_new_tokens=40)
    again = [Batch(Decoder(weights=weights), arena, rows, torch.arange(8), settings).run() for _ in range(2)]
    assert tokens(again[0]) == tokens(again[1]) == tokens(decoded(model, rows))


def test_ids_beyond_the_tokenizer_are_never_drawn() -> None:
    model, rows = model_of("opt"), prompts()
    weights = weights_of(model, vocab_limit=40)
    arena = Arena()
    arena.fit(weights, slots=8, length=60)
    settings = Sampling(temperature=3.0, stop_ids=(EOS,), max_new_tokens=30)
    drawn = Batch(Decoder(weights=weights), arena, rows, torch.arange(8), settings).run()
    assert max(max(row) for row in tokens(drawn)) < 40


def test_looking_seldom_at_what_has_ended_changes_nothing() -> None:
    """As on a GPU, where each look waits for the device."""
    for name, options in (("llama", {}), ("opt", {"repetition_penalty": 1.3, "min_new_tokens": 5})):
        model, rows = model_of(name), prompts()
        wanted = decoded(model, rows, temperature=1.0, slots=3, **options)
        found = decoded(model, rows, temperature=1.0, slots=3, check_every=8, **options)
        assert tokens(found) == tokens(wanted)
        for own, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(own.logprobs, other.logprobs, atol=1e-5, rtol=0)
            assert own.ended == other.ended


def test_steps_in_few_sizes_are_the_same() -> None:
    """As they are recorded on a GPU: with slots that nobody has, and a longer cache than is needed."""
    for name, options in (("llama", {}), ("bloom", {"repetition_penalty": 1.3, "min_new_tokens": 5, "top_k": 20})):
        model, rows = model_of(name), prompts()
        graphs = StepGraphs(record=False)
        for slots in (8, 8, 3):
            wanted = decoded(model, rows, temperature=1.0, slots=slots, **options)
            found = decoded(model, rows, temperature=1.0, slots=slots, check_every=8, graphs=graphs, **options)
            assert tokens(found) == tokens(wanted)
            for own, other in zip(found, wanted, strict=True):
                torch.testing.assert_close(own.logprobs, other.logprobs, atol=1e-5, rtol=0)
                assert own.ended == other.ended


def test_sizes_of_steps_are_few_and_never_too_small() -> None:
    graphs = StepGraphs(record=False)
    kinds = set()
    for size in (1, 2, 3, 13, 64):
        for count in range(1, size + 1):
            for length in (1, 64, 65, 300, 500):
                wide, long = graphs.sizes(count=count, length=length, size=size, room=500)
                assert count <= wide <= size
                assert wide < 2 * count
                assert length <= long <= min(500, length + 63)
                if size == 64:
                    kinds.add(wide)
    assert kinds == {1, 2, 4, 8, 16, 32, 64}


def test_adapters_that_are_not_merged_compute_the_same() -> None:
    targets = {"opt": ["q_proj", "fc1", "lm_head"], "qwen2": ["k_proj", "up_proj", "down_proj", "lm_head"]}
    targets |= {"pythia": ["query_key_value", "dense"], "bloom": ["query_key_value", "dense_4h_to_h"]}
    for name, modules in targets.items():
        model, rows = model_of(name), prompts()
        adapt(model, modules)
        wanted = expected(model, rows)
        assert wanted != expected(model_of(name), rows)
        own = {parameter.data_ptr() for parameter in model.parameters()}
        options: dict[str, Any] = {"rows": 8, "gather": lambda part: nullcontext(), "own": False}
        weights = generation_weights(decoder_parts(model), vocab_limit=SIZE, copy=False, **options)
        # Nothing but the positions' tables is beside the parameters.
        extra = [tensor for tensor in weights.tensors() if tensor.data_ptr() not in own]
        assert sum(tensor.numel() for tensor in extra) <= 16
        arena = Arena()
        arena.fit(weights, slots=8, length=70)
        settings = Sampling(temperature=0.0, stop_ids=(EOS,), max_new_tokens=40)
        assert tokens(Batch(Decoder(weights=weights), arena, rows, torch.arange(8), settings).run()) == wanted
        # And merged into a copy.
        assert tokens(decoded(model, rows, own=False)) == wanted


@pytest.mark.parametrize("name", MODELS)
def test_ranks_that_share_the_weights_compute_the_whole(name: str) -> None:
    """Two threads stand for two ranks: each has half of the heads and of the MLPs, and they add up their parts."""
    model, rows = model_of(name), prompts()
    barrier, parts, found = threading.Barrier(2), [torch.empty(0)] * 2, [list[Response]()] * 2

    def rank(index: int) -> None:
        def add_up(values: torch.Tensor) -> None:
            parts[index] = values.clone()
            barrier.wait()
            values.copy_(parts[0] + parts[1])
            barrier.wait()

        share = Share(rank=index, ranks=2)
        weights = generation_weights(
            decoder_parts(model), vocab_limit=SIZE, rows=8, gather=lambda part: nullcontext(), own=True, share=share
        )
        arena = Arena()
        arena.fit(weights, slots=8, length=70)
        settings = Sampling(temperature=0.0, stop_ids=(EOS,), max_new_tokens=40)
        found[index] = Batch(Decoder(weights=weights, reduce=add_up), arena, rows, torch.arange(8), settings).run()

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(rank, index) for index in range(2)]:
            done.result()
    wanted = decoded(model, rows)
    for own in found:
        assert tokens(own) == tokens(wanted)
        for response, other in zip(own, wanted, strict=True):
            torch.testing.assert_close(response.logprobs, other.logprobs, atol=1e-4, rtol=0)


def test_what_a_broken_sequence_leaves_in_the_cache_does_no_harm() -> None:
    model, rows = model_of("llama"), prompts()
    weights = weights_of(model)
    arena = Arena()
    arena.fit(weights, slots=8, length=70)
    for kept in arena.layers:
        kept.fill_(torch.nan)
    settings = Sampling(temperature=0.0, stop_ids=(EOS,), max_new_tokens=40)
    assert tokens(Batch(Decoder(weights=weights), arena, rows, torch.arange(8), settings).run()) == tokens(
        decoded(model, rows)
    )


def test_a_moved_sequence_takes_nothing_over_from_a_broken_one() -> None:
    weights = weights_of(model_of("llama"))
    arena = Arena()
    arena.fit(weights, slots=2, length=30)
    for kept in arena.layers:
        kept[:, 0], kept[:, 1] = torch.nan, 1.0
    arena.move(1, 0)
    for kept in arena.layers:
        assert (kept == 1.0).all()


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm])
def test_norms_in_bf16_are_those_of_transformers(kind: Any) -> None:
    norm = kind(64).to(torch.bfloat16)
    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
    x = torch.randn(9, 3, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    kept = x.clone()
    with torch.no_grad():
        assert torch.equal(Norm(norm, own=False)(x), norm(x))
    assert torch.equal(x, kept)


def test_adapters_that_cannot_be_merged_are_refused_before_anything_is_generated() -> None:
    for options, why in (
        ({"target_modules": ["embed_tokens"]}, "adapters of class Embedding"),
        ({"target_modules": ["q_proj"], "use_dora": True}, "DoRA"),
    ):
        model = model_of("qwen2")
        inject_adapter_in_model(PeftLoraConfig(r=2, **options), model)
        with pytest.raises(UnsupportedModelError, match=why):
            decoder_parts(model)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=SIZE)), "models of type gpt2"),
        (MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=16)), "sliding window"),
        (
            LlamaForCausalLM(
                LlamaConfig(**GROUPED, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
            ),
            "rotary positions of type dynamic",
        ),
    ],
)
def test_models_that_are_not_known_are_named(model: Any, why: str) -> None:
    with pytest.raises(UnsupportedModelError, match=why):
        decoder_parts(model)


def test_bf16_is_close_to_training() -> None:
    for name in MODELS:
        model, rows = model_of(name), prompts()
        model = type(model)(replace_range(model.config)).eval().to(torch.bfloat16)
        for row, response in zip(rows, decoded(model, rows, temperature=1.0), strict=True):
            with torch.no_grad():
                logits = model(torch.cat([row, response.ids]).unsqueeze(0)).logits[0, len(row) - 1 : -1].float()
            computed = logits.log_softmax(dim=1).gather(1, response.ids.unsqueeze(1)).squeeze(1)
            assert float((response.logprobs - computed).abs().mean()) < 0.02
