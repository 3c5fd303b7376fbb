"""Decoding by compiled blocks on a CPU, against transformers and against torch's operations."""

import copy
import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
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
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.models.decoder.parts import decoder_parts
from rlhf.models.decoder.weights import DecoderWeights
from rlhf.rollout.native import library as building
from rlhf.rollout.native.arena import Arena
from rlhf.rollout.native.compiled import CompiledBlocks, reason_against
from rlhf.rollout.native.forward import Decoder
from rlhf.rollout.native.library import NotCompiledError, load_library

pytestmark = [pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"), pytest.mark.processes]
NARROWER = {"avx512": (), "avx2": ("-mno-avx512f",), "sse": ("-mno-avx",)}


@pytest.fixture(params=NARROWER)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """Built for this CPU, and for ones with less; without the matrix unit, which bf16 is multiplied by elsewhere."""
    monkeypatch.setattr(building, "FLAGS", (*building.FLAGS, *NARROWER[request.param]))
    library = load_library.__wrapped__()
    library.decode_kind = lambda _model, _head, half: half.value
    return library


def test_greedy_tokens_are_those_of_transformers(library: ctypes.CDLL) -> None:
    for name in MODELS:
        model, rows = model_of(name), prompts()
        wanted = expected(model, rows)
        for slots, own in ((8, True), (3, False)):
            found = decoded(model, rows, slots=slots, own=own, library=library)
            assert tokens(found) == wanted, name
            assert [response.ended for response in found] == [row[-1] == EOS for row in wanted]
            for row, response in zip(rows, found, strict=True):
                with torch.no_grad():
                    logits = model(torch.cat([row, response.ids]).unsqueeze(0)).logits[0, len(row) - 1 : -1]
                computed = logits.log_softmax(dim=1).gather(1, response.ids.unsqueeze(1)).squeeze(1)
                torch.testing.assert_close(response.logprobs, computed, atol=1e-4, rtol=0)
        assert tokens(decoded(model, rows[:1], library=library)) == wanted[:1]


def test_sampled_tokens_are_those_of_torchs_operations() -> None:
    options: dict[str, Any] = {"temperature": 1.0, "seed": 3, "repetition_penalty": 1.2, "top_p": 0.9}
    for name in MODELS:
        model, rows = model_of(name), prompts()
        assert tokens(decoded(model, rows, library=load_library(), **options)) == tokens(
            decoded(model, rows, **options)
        )


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("qwen2", ["k_proj", "down_proj"]),
        # Adapters on some of the blocks: their joint projections lie otherwise than those of the others.
        ("pythia", ["layers.0.attention.query_key_value"]),
        ("bloom", ["h.1.self_attention.query_key_value"]),
    ],
)
def test_adapters_are_merged_and_the_weights_are_not_copied_otherwise(name: str, modules: list[str]) -> None:
    model, rows = model_of(name), prompts()
    own = {parameter.data_ptr() for parameter in model.parameters()}
    weights = weights_of(model, own=False, rows=None)
    tables = [id(table) for table in (weights.shape.rotary, weights.shape.alibi)]
    assert all(tensor.data_ptr() in own for tensor in weights.tensors() if id(tensor) not in tables)
    adapt(model, modules)
    wanted = expected(model, rows)
    assert wanted != expected(model_of(name), rows)
    assert tokens(decoded(model, rows, own=False, library=load_library())) == wanted


def state(weights: DecoderWeights, *, count: int, length: int = 40) -> tuple[Arena, torch.Tensor, torch.Tensor]:
    """A filled cache, and a token for each of its slots."""
    generator = torch.Generator().manual_seed(count)
    arena = Arena()
    arena.fit(weights, slots=count, length=length)
    for kept in arena.layers:
        kept.normal_(generator=generator).mul_(0.5)
    positions = torch.randint(0, length, (count,), generator=generator)
    return arena, torch.randint(0, SIZE, (count,), generator=generator), positions


def small(name: str) -> Any:
    """A model with weights of a usual size; `uneven` has matrices that do not fill tiles."""
    if name == "uneven":
        sizes = {"hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 1, "initializer_range": 0.02}
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**GROUPED | sizes)).eval()
    kind, config = MODELS[name]
    torch.manual_seed(0)
    return kind(replace_range(config)).eval()


def test_bf16_is_as_close_to_fp32_as_torchs_operations_are(library: ctypes.CDLL) -> None:
    check_bf16(library)


def test_bf16_is_as_close_by_the_matrix_unit() -> None:
    check_bf16(load_library())


def check_bf16(library: ctypes.CDLL) -> None:
    """The mean error of logits is not above that of torch's operations."""
    with torch.inference_mode():
        for name in (*MODELS, "uneven"):
            model = small(name)
            exact = weights_of(model, rows=None)
            half = weights_of(model.to(torch.bfloat16), rows=None)
            for count in (1, 7, 16, 17, 32, 33, 50):
                results = []
                for weights, compiled in ((exact, False), (half, False), (half, True)):
                    arena, ids, positions = state(weights, count=count)
                    blocks = CompiledBlocks(library, weights, arena) if compiled else None
                    decoder = Decoder(weights=weights, compiled=blocks)
                    results.append(decoder.decode(ids, positions, arena, length=40).float())
                errors = [(result - results[0]).abs().mean() for result in results[1:]]
                assert errors[1] < 1.3 * errors[0], (name, count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tokens_numbers_do_not_depend_on_its_neighbours(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    check_neighbours(library, dtype)


def test_a_tokens_numbers_do_not_depend_on_its_neighbours_in_the_matrix_unit() -> None:
    check_neighbours(load_library(), torch.bfloat16)


def check_neighbours(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    """To the last bit, whatever the number of threads."""
    threads = torch.get_num_threads()
    with torch.inference_mode():
        for name in ("llama", "bloom", "uneven"):
            weights = weights_of(small(name).to(dtype), rows=None)
            arena, ids, positions = state(weights, count=37)
            results = []
            for number in (1, 2, 3):
                torch.set_num_threads(number)
                blocks = CompiledBlocks(library, weights, arena)
                decoder = Decoder(weights=weights, compiled=blocks)
                results.append(decoder.decode(ids, positions, arena, length=40))
                fewer = [decoder.decode(ids[:count], positions[:count], arena, length=40) for count in (1, 5, 16, 30)]
                for part in fewer:
                    assert torch.equal(part, results[-1][: len(part)])
            torch.set_num_threads(threads)
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])


def test_what_a_broken_sequence_leaves_behind_does_no_harm_and_is_not_hidden() -> None:
    weights = weights_of(model_of("llama"), rows=None)
    with torch.inference_mode():
        arena, ids, positions = state(weights, count=3)
        decoder = Decoder(weights=weights, compiled=CompiledBlocks(load_library(), weights, arena))
        wanted = decoder.decode(ids, positions, arena, length=40)
        for kept in arena.layers:
            for slot, position in enumerate(positions.tolist()):
                kept[:, slot, :, position:] = torch.nan
        assert torch.equal(decoder.decode(ids, positions, arena, length=40), wanted)
        positions[0] = 5
        for kept in arena.layers:
            kept[1, 0, :, 3] = torch.nan
        broken = decoder.decode(ids, positions, arena, length=40)
        assert broken[0].isnan().all()
        assert torch.equal(broken[1:], wanted[1:])


def test_what_the_compiled_blocks_do_not_have_is_named() -> None:
    def reason(model: Any, *, merged: bool = True) -> str | None:
        return reason_against(decoder_parts(model), merged=merged)

    for name in MODELS:
        assert reason(model_of(name)) is None
    other = model_of("llama")
    other.config = copy.deepcopy(other.config)
    other.config.hidden_act = "gelu_new"
    assert reason(other) == "activation gelu_new"
    assert reason(model_of("llama").to(torch.float16)) == "weights in float16"
    mixed = model_of("llama").to(torch.bfloat16)
    mixed.model.layers[1].input_layernorm.float()
    assert reason(mixed) == "weights in bfloat16 and float32"
    adapted = model_of("llama")
    inject_adapter_in_model(PeftLoraConfig(r=3, target_modules=["k_proj"]), adapted)
    assert reason(adapted) is None
    assert reason(adapted, merged=False) == "adapters beside the weights"


COMPILERS = {
    "nothing-of-this-name": "no C\\+\\+ compiler nothing-of-this-name",
    "false": "false: exit code 1",
    'g++ "': "ValueError: No closing quotation",
    "{folder}/clang": "it takes g\\+\\+",
    "{folder}/broken": "broken: fatal error: no space",
}


@pytest.mark.parametrize("name", COMPILERS)
def test_a_compiler_that_cannot_be_used_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path / "clang", "echo '#define __clang__ 1'")
    script(tmp_path / "broken", "case $* in *-dM*) ;; *) echo 'fatal error: no space' >&2; exit 1;; esac")
    monkeypatch.setenv("CXX", name.format(folder=tmp_path))
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    with pytest.raises(NotCompiledError, match=COMPILERS[name]):
        load_library.__wrapped__()
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_a_directory_that_others_may_write_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / f"compiled-{os.getuid()}"
    directory.mkdir()
    directory.chmod(0o777)
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path))
    with pytest.raises(NotCompiledError, match="others may write to"):
        load_library.__wrapped__()


def script(path: Path, text: str) -> None:
    """A program."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_processes_that_start_together_compile_once(tmp_path: Path) -> None:
    script(tmp_path / "compiler", f"echo $* >> {tmp_path}/calls; exec g++ $* -O0")
    environment = os.environ | {"CXX": str(tmp_path / "compiler"), "RLHF_CACHE": str(tmp_path / "cache")}
    code = "from rlhf.rollout.native.library import load_library; print(load_library().decode_kind)"
    ranks = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [rank.wait() for rank in ranks] == [0, 0]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert sum("-shared" in call for call in calls) == 1
    assert len(list((tmp_path / "cache").rglob("*.so"))) == 1
