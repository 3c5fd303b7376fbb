"""Native decoding on a GPU, where steps are recorded as CUDA graphs. `make test-gpu`."""

from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from decoders import EOS, MODELS, SIZE, expected, model_of, prompts, tokens
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model

from rlhf.models.decoder.parts import DecoderParts, decoder_parts
from rlhf.models.decoder.weights import DecoderWeights, generation_weights
from rlhf.rollout.native.arena import Arena
from rlhf.rollout.native.forward import Decoder
from rlhf.rollout.native.graphs import StepGraphs
from rlhf.rollout.native.loop import Batch
from rlhf.rollout.responses import Response
from rlhf.rollout.sampling import Sampling

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


def on_gpu(model: Any) -> Any:
    """A copy of a model on the GPU, computing exactly."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.enable_cudnn_sdp(False)  # As in every rank.
    return deepcopy(model).to("cuda")


def parts_of(model: Any) -> DecoderParts:
    """A model's parts, with the tables on the GPU."""
    parts = decoder_parts(model)
    return replace(parts, shape=parts.shape.to("cuda"))


def weights_of(parts: DecoderParts, *, own: bool, copy: bool = True) -> DecoderWeights:
    """The weights, copied or as they are."""
    options: dict[str, Any] = {"rows": 8, "gather": lambda part: nullcontext()}
    return generation_weights(parts, vocab_limit=SIZE, own=own, copy=copy, **options)


def rollout(
    weights: DecoderWeights, arena: Arena, graphs: StepGraphs | None, *, slots: int = 8, **options: Any
) -> list[Response]:
    """Responses, in this process's cache."""
    settings = {"temperature": 0.0, "stop_ids": (EOS,), "max_new_tokens": 40} | options
    arena.fit(weights, slots=slots, length=72)
    sampling, rows, streams = Sampling(**settings), prompts(), torch.arange(len(prompts()))
    return Batch(Decoder(weights=weights), arena, rows, streams, sampling, slots=slots, graphs=graphs).run()


@pytest.mark.parametrize("name", MODELS)
def test_recorded_steps_give_the_tokens_of_transformers(name: str) -> None:
    model = model_of(name)
    moved, arena, graphs = on_gpu(model), Arena(), StepGraphs(record=True)
    parts = parts_of(moved)
    for _ in range(2):
        weights = weights_of(parts, own=False)
        assert tokens(rollout(weights, arena, None)) == expected(model, prompts())
        for slots in (8, 3, 8):
            assert tokens(rollout(weights, arena, graphs, slots=slots)) == expected(model, prompts())
        assert graphs.recorded > 0
        # Training changes the weights in place: what was recorded computes with the new ones.
        other = model_of(name, seed=1)
        model.load_state_dict(other.state_dict())
        moved.load_state_dict(other.state_dict())


def test_graphs_are_kept_while_no_address_changes_and_made_anew_when_one_does() -> None:
    parts, arena, graphs = parts_of(on_gpu(model_of("bloom"))), Arena(), StepGraphs(record=True)
    wanted = tokens(rollout(weights_of(parts, own=False), Arena(), None))
    for _ in range(3):
        assert tokens(rollout(weights_of(parts, own=False), arena, graphs)) == wanted
    kept = dict(graphs._graphs)
    assert kept
    assert tokens(rollout(weights_of(parts, own=False), arena, graphs)) == wanted
    assert all(graphs._graphs[kind] is graph for kind, graph in kept.items())
    copied = weights_of(parts, own=True)
    assert tokens(rollout(copied, arena, graphs)) == wanted
    assert not any(graph in kept.values() for graph in graphs._graphs.values())
    graphs.release()
    assert graphs.recorded == 0


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("name", ["opt", "qwen2", "pythia"])
def test_adapters_are_recorded_too(name: str, copy: bool) -> None:
    model = model_of(name)
    inject_adapter_in_model(PeftLoraConfig(r=3, lora_alpha=7, target_modules="all-linear"), model)
    for part, parameter in model.named_parameters():
        if "lora_B" in part:
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(len(part)))
    parts, arena, graphs = parts_of(on_gpu(model)), Arena(), StepGraphs(record=True)
    for _ in range(2):
        assert tokens(rollout(weights_of(parts, own=False, copy=copy), arena, graphs)) == expected(model, prompts())
    assert graphs.recorded > 0


@pytest.mark.parametrize("name", MODELS)
def test_recorded_steps_in_bf16_are_those_that_are_not(name: str) -> None:
    weights = weights_of(parts_of(on_gpu(model_of(name)).bfloat16()), own=False)
    graphs, arena = StepGraphs(record=True), Arena()
    plain, found = rollout(weights, Arena(), StepGraphs(record=False)), rollout(weights, arena, graphs)
    found = rollout(weights, arena, graphs)
    assert graphs.recorded > 0
    assert tokens(found) == tokens(plain)
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-3, rtol=0)


def test_what_cannot_be_recorded_is_run_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    class Waiting(Decoder):
        def decode(self, *args: Any, **options: Any) -> torch.Tensor:
            logits = super().decode(*args, **options)
            logits.sum().item()  # Waits for the device.
            return logits

    weights, graphs = weights_of(parts_of(on_gpu(model_of("llama"))), own=False), StepGraphs(record=True)
    arena, wanted = Arena(), tokens(rollout(weights, Arena(), None))
    arena.fit(weights, slots=8, length=72)
    settings = Sampling(temperature=0.0, stop_ids=(EOS,), max_new_tokens=40)
    batch = Batch(Waiting(weights=weights), arena, prompts(), torch.arange(8), settings, graphs=graphs)
    assert tokens(batch.run()) == wanted
    assert not graphs.record
    assert "not recorded as CUDA graphs" in caplog.text
    torch.cuda.empty_cache()  # The allocator knows that recording is over,
    torch.rand(1, device="cuda")  # and so do torch's random numbers.


def test_drawn_tokens_are_the_same_recorded_or_not() -> None:
    for name, options in (("llama", {}), ("bloom", {"repetition_penalty": 1.3, "min_new_tokens": 5, "top_p": 0.9})):
        weights, arena = weights_of(parts_of(on_gpu(model_of(name))), own=False), Arena()
        graphs = StepGraphs(record=True)
        wanted = tokens(rollout(weights, arena, None, temperature=1.0, **options))
        for _ in range(2):
            assert tokens(rollout(weights, arena, graphs, temperature=1.0, **options)) == wanted
        assert graphs.recorded > 0
