"""What ends a response: the model's own list, the tokenizer's EOS and the end that the chat template writes, alike
for every way to generate, for what asks whether a response ended, for the chat and for the exported model."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from published import FAMILIES, tokenizer_of
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from rlhf import chat
from rlhf.batch import PromptBatch, Rollout
from rlhf.config.choices import RolloutBackend
from rlhf.config.schema import Config, DataConfig, RolloutConfig
from rlhf.data.conversation import Message
from rlhf.engine.export import export_model
from rlhf.models.load import answer_ends, load_causal_lm, set_special_tokens
from rlhf.models.tokenizer import complete_tokenizer, encode_prompt
from rlhf.rollout.generate import Generator
from rlhf.rollout.prompts import prompt_batch
from rlhf.rollout.score import encode_anew, ended_with_eos, response_texts
from rlhf.rollout.vllm import parameters
from rlhf.stages.ppo.config import PPOConfig
from rlhf.stages.session import generator_of

DEFAULTS = {"do_sample": True, "top_k": 2, "temperature": 0.3, "repetition_penalty": 1.3}
LIMIT = 6


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """A process group of this process only."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def saying(tokenizer: Any, *, following: dict[int, int]) -> LlamaForCausalLM:
    """A model in which each token is followed by the one that is given, or else by itself."""
    size = len(tokenizer)
    sizes: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size,
            hidden_size=320,
            intermediate_size=8,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            **sizes,
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        for token in range(size):
            model.get_input_embeddings().weight[token, token] = 1.0
            model.lm_head.weight[following.get(token, token), token] = 10.0
    return model


def ids_of(tokenizer: Any, *tokens: str) -> list[int]:
    return [int(tokenizer.convert_tokens_to_ids(token)) for token in tokens]


@pytest.fixture(scope="module", params=["llama3.1", "gemma", "phi3", "qwen2.5", "qwen3-base", "yi"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A family's miniature: behind A, B and C comes a letter and then its template's end, its EOS and its last end."""
    name = request.param
    known, directory = FAMILIES[name], tmp_path_factory.mktemp(name.replace(".", "-"))
    tokenizer = tokenizer_of(name)
    complete_tokenizer(tokenizer, chat_template=None)
    following = {}
    for opening, letter, end in zip("ABC", "xyz", (known.end, known.eos, known.own[-1]), strict=True):
        first, second, last = ids_of(tokenizer, opening, letter, end)
        following |= {first: second, second: last}
    saying(tokenizer, following=following).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    own = {"eos_token_id": ids_of(tokenizer, *known.own), **DEFAULTS}
    (directory / "generation_config.json").write_text(json.dumps(own))
    return name, directory


def loaded(name: str, directory: Path) -> tuple[Any, Any]:
    """The model and its tokenizer as a stage has them."""
    tokenizer = tokenizer_of(name)
    complete_tokenizer(tokenizer, chat_template=None)
    return load_causal_lm(directory, tokenizer, dtype=torch.float32, attention="sdpa"), tokenizer


def engine_of(model: Any) -> Any:
    """What an unpartitioned engine looks like from here."""
    return SimpleNamespace(
        module=model, device=torch.device("cpu"), optimizer=None, zero_optimization_partition_weights=lambda: False
    )


def generator(model: Any, tokenizer: Any, backend: RolloutBackend, **options: Any) -> Generator:
    config = Config(
        stage=PPOConfig(),
        data=DataConfig(max_response_length=LIMIT),
        rollout=RolloutConfig(backend=backend, gather=True, tensor_parallel=1, **options),
    )
    return generator_of(config, engine_of(model), tokenizer, vocab_limit=len(tokenizer))


def prompts(tokenizer: Any) -> PromptBatch:
    """Prompts that end with A, B, C, and D, to which the answer never ends."""
    rows = ids_of(tokenizer, *"ABCD")
    return PromptBatch(prompt_ids=torch.tensor(rows).unsqueeze(1), prompt_mask=torch.ones(4, 1, dtype=torch.bool))


def test_native_decoding_transformers_and_vllm_end_at_the_same_tokens(family: tuple[str, Path]) -> None:
    name, directory = family
    model, tokenizer = loaded(name, directory)
    known = FAMILIES[name]
    wanted = set(ids_of(tokenizer, *known.own, known.eos, known.end))
    ends = ids_of(tokenizer, known.end, known.eos, known.own[-1])
    letters = ids_of(tokenizer, *"xyzD")
    for backend in (RolloutBackend.native, RolloutBackend.hf):
        answering = generator(model, tokenizer, backend)
        assert set(answering.sampling.stop_ids) == wanted
        rollout = answering.generate(prompts(tokenizer))
        found = [ids[mask].tolist() for ids, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)]
        # The token that ended a response is kept as it was sampled.
        assert found == [[letter, end] for letter, end in zip(letters, ends, strict=False)] + [[letters[3]] * LIMIT]
        assert rollout.ended is not None and rollout.ended.tolist() == [True, True, True, False]
        assert response_texts(rollout, tokenizer) == ["x", "y", "z", "D" * LIMIT]
        vllm = parameters(answering.sampling, limit=len(tokenizer), vocab_size=len(tokenizer))
        assert set(vllm["stop_token_ids"]) == wanted and vllm["ignore_eos"]
        if len(wanted) > 1:
            said = tokenizer.convert_ids_to_tokens(list(answering.sampling.stop_ids))
            assert answering.description.endswith(f"; a response ends with {', '.join(said)}")


def test_no_end_is_drawn_before_the_shortest_response(family: tuple[str, Path]) -> None:
    name, directory = family
    model, tokenizer = loaded(name, directory)
    rows = prompts(tokenizer)
    alike = []
    for backend in (RolloutBackend.native, RolloutBackend.hf):
        answering = generator(model, tokenizer, backend, min_new_tokens=4, temperature=0.01, top_k=1)
        rollout = answering.generate(rows)
        early = rollout.response_ids[:, :4]
        assert not torch.isin(early, torch.tensor(answering.sampling.stop_ids)).any()
        alike.append(early.shape)
    assert alike[0] == alike[1]


def test_a_models_sampling_defaults_decide_nothing_and_are_kept_apart(family: tuple[str, Path], tmp_path: Path) -> None:
    name, directory = family
    model, tokenizer = loaded(name, directory)
    sampling = generator(model, tokenizer, RolloutBackend.hf).sampling
    assert (sampling.temperature, sampling.top_k, sampling.repetition_penalty) == (1.0, 0, 1.0)
    assert not set(model.generation_config.to_diff_dict()) & set(DEFAULTS)
    for target in (tmp_path / "first", tmp_path / "second"):  # A stage's model, and that of the stage behind it.
        export_model(engine_of(model), model, tokenizer, target)
        own = json.loads((directory / "generation_config.json").read_text())["eos_token_id"]
        stored = json.loads((target / "generation_config.json").read_text())
        ends = stored["eos_token_id"]
        assert (ends if isinstance(ends, list) else [ends])[: len(own)] == own
        assert set(ends if isinstance(ends, list) else [ends]) == set(answer_ends(model))
        assert not set(stored) & set(DEFAULTS)
        apart = GenerationConfig.from_pretrained(target, config_file_name="sampling_defaults.json")
        assert {key: getattr(apart, key) for key in DEFAULTS} == DEFAULTS
        model, tokenizer = loaded(name, target)


def test_the_chat_ends_where_a_rollout_does(family: tuple[str, Path], tmp_path: Path) -> None:
    name, directory = family
    model, tokenizer = loaded(name, directory)
    export_model(engine_of(model), model, tokenizer, tmp_path / "model")
    talking = chat.load_chat(tmp_path / "model", chat.Options(greedy=True, max_new_tokens=LIMIT))
    assert answer_ends(talking.model) == answer_ends(model)
    for opening, said in zip("ABC", "xyz", strict=True):
        output = io.StringIO()
        assert talking._generate(ids_of(tokenizer, opening), output) == said
        assert output.getvalue() == f"{said}\n"


def test_without_a_list_of_its_own_a_model_ends_with_eos_and_its_template(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("gemma")
    model = saying(tokenizer, following={})
    model.save_pretrained(tmp_path)  # Which writes the class's default, 2, into generation_config.json.
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 2
    plain = load_causal_lm(tmp_path, tokenizer, dtype=torch.float32, attention="sdpa")
    assert answer_ends(plain) == tuple(ids_of(tokenizer, "<eos>", "<end_of_turn>"))
    # Older models have the list in config.json alone.
    listed = ids_of(tokenizer, "<end_of_turn>", "<unk>")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "eos_token_id": listed}))
    (tmp_path / "generation_config.json").unlink()
    older = load_causal_lm(tmp_path, tokenizer, dtype=torch.float32, attention="sdpa")
    assert answer_ends(older) == (*listed, *ids_of(tokenizer, "<eos>"))
    # One token is stored as one, as ever.
    mistral = tokenizer_of("mistral")
    single = saying(mistral, following={})
    set_special_tokens(single, mistral)
    assert single.generation_config.eos_token_id == single.config.eos_token_id == ids_of(mistral, "</s>")[0]


def test_a_reward_models_own_end_stands_behind_an_answer_that_ended() -> None:
    policy, reward = tokenizer_of("llama3.1"), tokenizer_of("gemma")
    complete_tokenizer(policy, chat_template=None)
    batch = prompt_batch(policy, ["Name a colour.", "And a fruit?"])
    first, second = encode_anew(batch, ["Red.", "An app"], [True, False], reward)
    wanted = encode_prompt(reward, [Message("user", "Name a colour.")])
    assert first == [*wanted, *reward("Red.", add_special_tokens=False)["input_ids"], *ids_of(reward, "<end_of_turn>")]
    assert reward.decode(second).endswith("<start_of_turn>model\nAn app")


def test_a_rollout_of_unknown_origin_ended_if_its_last_token_is_an_end() -> None:
    ids = torch.tensor([[5, 1], [5, 7], [5, 5], [1, 0]])
    mask = torch.tensor([[True, True], [True, True], [True, True], [True, False]])
    rollout = Rollout(
        sequence_ids=torch.cat([torch.zeros(4, 1, dtype=torch.long), ids], dim=1),
        prompt_mask=torch.ones(4, 1, dtype=torch.bool),
        response_mask=mask,
    )
    assert ended_with_eos(rollout, ends=(1, 7)).tolist() == [True, True, False, True]
