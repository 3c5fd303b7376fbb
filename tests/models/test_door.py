"""Model directories that are damaged or hostile: each is loaded, or refused in one message.

By hand for longer: RLHF_FUZZ=500 pytest tests/models/test_door.py -k fuzz
"""

import io
import json
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf.chat import Options, find_model, load_chat
from rlhf.config.errors import ConfigError, DataError
from rlhf.config.model_directory import check_directory, directory_faults, own_code
from rlhf.config.model_files import stored_tensors
from rlhf.config.schema import Config, ModelConfig, WeightSource
from rlhf.data.conversation import Message
from rlhf.models.door import check_tokenizer, load_model
from rlhf.models.load import has_scalar_head, load_causal_lm, load_scalar_model
from rlhf.models.tokenizer import (
    complete_tokenizer,
    encode_prompt,
    encode_prompts,
    encode_response,
    load_tokenizer,
    prepare_tokenizer,
)
from rlhf.planner.architecture import from_directory
from rlhf.rollout.reward import score
from rlhf.stages.start import code_notes

TEMPLATE = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' </s> ' }}{% endfor %}"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    words = {word: number for number, word in enumerate(["<unk>", "</s>", "<pad>", "user", "assistant", "a", "b"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=7, max_position_embeddings=16, pad_token_id=2, **sizes)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return folder


def changed(good: Path, target: Path, file: str, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy with one JSON file changed."""
    shutil.copytree(good, target, dirs_exist_ok=True)
    entries = json.loads((target / file).read_text()) if (target / file).exists() else {}
    result = change(entries)
    (target / file).write_text(json.dumps(entries if result is None else result))
    return target


def setting(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda entries: entries.update(values)


THREE_HEADS = setting(num_attention_heads=3, head_dim=None, num_key_value_heads=None)


def test_a_whole_directory_has_no_faults(good: Path) -> None:
    assert directory_faults(good) == []
    tokenizer = load_tokenizer(good)
    assert load_causal_lm(good, tokenizer, dtype=torch.float32, attention="eager").config.num_hidden_layers == 2
    assert not has_scalar_head(good)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("config.json", lambda e: [], "config.json holds a list where an object belongs"),
        ("config.json", setting(model_type=None), "model_type is null"),
        ("config.json", setting(num_attention_heads=0), "num_attention_heads=0; it must be from 1"),
        (
            "config.json",
            THREE_HEADS,
            "num_attention_heads=3 does not divide hidden_size=8",
        ),
        ("config.json", setting(hidden_size=-8), "hidden_size=-8"),
        ("config.json", setting(hidden_size=10**400), "hidden_size=a number of more than 24 digits"),
        ("config.json", setting(hidden_size="8"), "hidden_size is the text '8'"),
        ("config.json", setting(hidden_size=True), "hidden_size is true"),
        ("config.json", setting(vocab_size=8), "vocab_size=8, but the embedding's weights have 7"),
        ("config.json", setting(num_hidden_layers=4), "num_hidden_layers=4, but the weights have 2 layers"),
        ("config.json", setting(architectures="Llama"), "architectures is the text 'Llama'"),
        ("config.json", setting(pad_token_id=9), "pad_token_id=9 is not below vocab_size=7"),
        ("config.json", setting(rope_parameters=[1]), "rope_parameters is a list"),
        ("config.json", setting(num_labels=10**9), "num_labels=1000000000; it must be from 1 to 65,536"),
        ("config.json", setting(num_experts=10**9), "num_experts=1000000000; it must be"),
        ("config.json", setting(text_config={"num_hidden_layers": 10**9}), "text_config.num_hidden_layers=1000000000;"),
        ("config.json", setting(rms_norm_eps=math.nan), "rms_norm_eps is nan; it must be a finite number"),
        ("config.json", setting(rope_parameters={"a": [1, math.inf]}), "rope_parameters.a is inf"),
        ("config.json", setting(dtype="load"), "dtype is the text 'load'; it must be a format of weights"),
        ("config.json", setting(dtype={"text_config": 5}), "dtype is the number 5"),
        (
            "config.json",
            setting(num_key_value_heads=1, head_dim=4),
            "num_key_value_heads=1 and head_dim=4 make 4 rows, but model.layers.0.self_attn.k_proj.weight has 8",
        ),
        (
            "config.json",
            setting(intermediate_size=32),
            "intermediate_size=32 makes 32 rows, but model.layers.0.mlp.up_proj.weight has 16",
        ),
        ("tokenizer.json", lambda e: e["model"]["vocab"].update(b=5), "model.vocab: 'a' and 'b' have the same id 5"),
        ("tokenizer_config.json", setting(eos_token="notthere"), "eos_token is 'notthere', which is no token of"),
        ("generation_config.json", setting(temperature=math.nan), "temperature is nan"),
        (
            "tokenizer.json",
            lambda e: e["model"]["vocab"].update(a=4294967295),
            "the id of 'a' is the number 4294967295",
        ),
        ("tokenizer.json", lambda e: e["model"]["vocab"].update(a=-1), "the id of 'a' is the number -1"),
        ("tokenizer.json", lambda e: e["added_tokens"][0].update(id=2**31), "the id of '<unk>' is"),
        ("tokenizer.json", setting(added_tokens="x"), "added_tokens is the text 'x'"),
        ("tokenizer.json", setting(model=None), "model is null"),
        ("tokenizer_config.json", setting(eos_token=[1]), "eos_token is a list"),
        ("tokenizer_config.json", setting(chat_template=5), "chat_template is the number 5"),
        ("tokenizer_config.json", setting(model_max_length="x"), "model_max_length is the text 'x'"),
        ("tokenizer_config.json", setting(added_tokens_decoder={"4294967295": {}}), "is no token's id below"),
        ("generation_config.json", setting(eos_token_id="x"), "eos_token_id is the text 'x'"),
        ("adapter_config.json", setting(base_model_name_or_path="evil/base"), "an adapter of 'evil/base'"),
    ],
)
def test_each_fault_is_told_with_file_field_and_reason(
    good: Path, tmp_path: Path, file: str, change: Callable[[dict[str, Any]], Any], said: str
) -> None:
    directory = changed(good, tmp_path / "model", file, change)
    with pytest.raises(ConfigError) as raised:
        check_directory(directory)
    assert said in str(raised.value) and str(directory) in str(raised.value)


def test_weights_that_are_cut_off_missing_elsewhere_or_pickled_are_told(good: Path, tmp_path: Path) -> None:
    directory = changed(good, tmp_path / "model", "config.json", setting())
    weights = directory / "model.safetensors"
    content = weights.read_bytes()
    for damaged, said in (
        (content[:-10], "was cut off or changed"),
        (content[:5], "no safetensors file, or was cut off"),
        (b"\xff" * 100, "no safetensors file, or was cut off"),
        (b"\x02\0\0\0\0\0\0\0[]", "holds a list where an object belongs"),
    ):
        weights.write_bytes(damaged)
        assert said in "".join(directory_faults(directory)), damaged[:20]
    weights.rename(directory / "pytorch_model.bin")
    assert "pytorch_model.bin, a pickle, which may run code" in directory_faults(directory)[0]
    (directory / "a.safetensors").write_bytes(content)
    for places, said in (
        ({"x": "../../secret.safetensors"}, "only *.safetensors in the same directory are read"),
        ({"x": "b.safetensors"}, "b.safetensors, which is not there"),
        ({"x": "a.safetensors"}, "says that 'x' is in a.safetensors, but it is not"),
        ([], "weight_map is a list"),
        (None, "metadata is a list where an object belongs"),
    ):
        entries = {"weight_map": {"x": "a.safetensors"} if places is None else places}
        entries |= {"metadata": []} if places is None else {}
        (directory / "model.safetensors.index.json").write_text(json.dumps(entries))
        assert said in "".join(directory_faults(directory)), places


def test_weights_that_would_be_random_are_told(good: Path, tmp_path: Path) -> None:
    directory = changed(good, tmp_path / "model", "config.json", setting())
    weights = load_file(directory / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lack 1 of the weights of LlamaForCausalLM, such as model\.layers\.1\.mlp"):
        load_model(AutoModelForCausalLM, directory)


def test_an_endless_step_of_time_is_no_fault(good: Path, tmp_path: Path) -> None:
    """Mamba's configurations have it."""
    change = setting(time_step_limit=[0.0, math.inf])
    assert directory_faults(changed(good, tmp_path / "model", "config.json", change)) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (setting(hidden_act="evil"), "config.json: hidden_act='evil' is nothing that transformers knows"),
        (
            setting(rope_parameters={"rope_type": "evil", "rope_theta": 1.0}),
            "config.json: rope_parameters.rope_type='ev",
        ),
        (setting(hidden_act=5), "Validation error for field 'hidden_act': TypeError: Field 'hidden_act' expected str"),
        (
            setting(num_key_value_heads=1, head_dim=None),
            "4 of its weights have other shapes than config.json says: model.layers.0.self_attn.k_proj.weight is "
            "[8, 8], but config.json makes it [4, 8]",
        ),
    ],
)
def test_what_only_the_library_finds_names_the_field(
    good: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], said: str
) -> None:
    directory = changed(good, tmp_path / "model", "config.json", change)
    with pytest.raises(ConfigError) as raised:
        load_model(AutoModelForCausalLM, directory)
    assert said in str(raised.value)


def test_weights_and_outputs_that_are_no_numbers_are_told(good: Path, tmp_path: Path) -> None:
    directory = changed(good, tmp_path / "model", "config.json", setting())
    talking = load_chat(directory, Options(max_new_tokens=2))
    talking.model.model.norm.weight.data.fill_(math.inf)
    with pytest.raises(ConfigError, match="the model's outputs are no numbers"):
        talking.answer("a", io.StringIO(), io.StringIO())
    weights = load_file(directory / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"the weights model\.norm\.weight hold NaN or infinity"):
        load_chat(directory, Options())


def test_pipes_and_links_in_a_circle_are_told(good: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        for number, said in enumerate(("is a named pipe", "Too many levels of symbolic links")):
            directory = changed(good, tmp_path / f"{name}-{number}", name, setting())
            (directory / name).unlink()
            os.symlink(name, directory / name) if number else os.mkfifo(directory / name)
            assert any(name in fault and said in fault for fault in directory_faults(directory)), (name, said)


def test_the_chat_tells_names_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for name, said in ((tmp_path / "loop", "is a link that leads nowhere"), (Path("x" * 300), "there is no directory")):
        with pytest.raises(ConfigError, match=said):
            find_model(name)


def test_scoring_tells_what_is_no_reward_model_or_no_conversation(good: Path, tmp_path: Path) -> None:
    change = setting(architectures=["LlamaForSequenceClassification"])
    directory = changed(good, tmp_path / "model", "config.json", change)
    question = [{"role": "user", "content": "a"}]
    for name in ("nope", "x" * 300, directory / "config.json"):
        with pytest.raises(ConfigError, match="there is no directory"):
            score(name, [question])
    with pytest.raises(ConfigError, match=r"its last message must be the assistant's"):
        score(directory, [question], normalize=False)
    changed(directory, tmp_path / "endless", "tokenizer_config.json", setting(eos_token=None))
    with pytest.raises(ConfigError, match="has no EOS token"):
        score(tmp_path / "endless", [[*question, {"role": "assistant", "content": "b"}]], normalize=False)


def test_code_of_a_model_is_noticed_and_never_run(good: Path, tmp_path: Path) -> None:
    assert not own_code(good)
    directory = changed(good, tmp_path / "model", "config.json", setting(auto_map={"AutoConfig": "evil.Config"}))
    (directory / "evil.py").write_text("raise SystemExit('run')\n")
    assert own_code(directory)
    load_causal_lm(directory, load_tokenizer(directory), dtype=torch.float32, attention="eager")
    unknown = changed(directory, tmp_path / "unknown", "config.json", setting(model_type="evil"))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        has_scalar_head(unknown)


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.processes
def test_a_given_template_is_tried_on_several_conversations_and_a_good_one_once(good: Path, tmp_path: Path) -> None:
    late = "{% if messages | length > 3 %}" + LOOP + "{% endif %}{{ messages[0].content }}"
    said = r"the chat template that is given for .* cannot be used: it does not come to an end on a conversation of 4 m"
    model = ModelConfig(name="hf", source=WeightSource.pretrained, path=str(good), chat_template=late)
    with pytest.raises(ConfigError, match=said):
        prepare_tokenizer(model, texts=lambda: iter(()), fingerprint="f", cache_dir=tmp_path)
    assert not list(tmp_path.rglob("tried-*"))
    check_tokenizer(good, cache_dir=tmp_path)
    assert len(list(tmp_path.rglob("tried-*"))) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf.models.door._tried", lambda *_: pytest.fail("tried again"))
        check_tokenizer(good, cache_dir=tmp_path)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 'x' * 9999999999 }}", "the chat template of .* it takes too much memory"),
        (None, "the tokenizer of .* cannot be used: (PanicException|native code crashes)"),
    ],
)
def test_chat_and_score_try_what_may_crash_in_a_process_of_its_own(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str | None, said: str
) -> None:
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    grows = {"type": "Replace", "pattern": {"Regex": "."}, "content": "." * 40}
    normalizer = {"type": "Sequence", "normalizers": [grows] * 6}
    directory = changed(
        good, tmp_path / "model", "tokenizer.json", setting(**({} if template else {"normalizer": normalizer}))
    )
    if template:
        (directory / "chat_template.jinja").write_text(template)
    with pytest.raises(ConfigError, match=said):
        load_chat(directory, Options())
    scorer = changed(
        directory, tmp_path / "scorer", "config.json", setting(architectures=["XForSequenceClassification"])
    )
    with pytest.raises(ConfigError, match=said):
        score(scorer, [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]])


def test_a_row_on_which_the_template_does_not_end_stops_everything_and_is_told(
    good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf.models.turns.RENDER_SECONDS", 0.2)
    monkeypatch.setattr("rlhf.models.turns.MORE_SECONDS", 0.0)
    tokenizer = load_tokenizer(good)
    tokenizer.chat_template = "{% if 'b' in messages[0].content %}" + LOOP + "{% endif %}{{ messages[0].content }}"
    with pytest.raises(
        DataError, match=r"does not come to an end on a conversation that begins with 'a b' \(messages: 1"
    ):
        encode_prompts(tokenizer, [[Message("user", text)] for text in ("a", "a b", "a a")])
    assert encode_prompt(tokenizer, [Message("user", "a")])


def test_what_the_native_tokenizer_raises_on_a_text_is_told(good: Path, tmp_path: Path) -> None:
    directory = changed(good, tmp_path / "model", "tokenizer.json", lambda e: e["model"].update(unk_token=""))
    with pytest.raises(ConfigError, match="the tokenizer fails on a text: WordLevel error: Missing"):
        encode_response(load_tokenizer(directory), "x")


ODD: list[Any] = [None, True, -1, 0, 2, 1.5, 10**30, 2**31, "x", "", [], [1], {}, {"a": None}, "\x1b]0;x\x07"]
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors")
FILES += ("chat_template.jinja", "model.safetensors.index.json", "adapter_config.json")


def places_of(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every container of a JSON value with each of its keys."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    for key in keys:
        found.append((value, key))
        places_of(value[key], found)
    return found


def parsed(path: Path) -> Any:
    """The JSON of a file that may have been damaged before; None for what is no object with something in it."""
    try:
        value = json.loads(path.read_text())
    except ValueError:
        return None
    return value if isinstance(value, dict) and value else None


def mutate(directory: Path, luck: random.Random) -> str:
    """Damage one file, in its JSON or in its bytes; say what was done."""
    name = luck.choice(FILES)
    path = directory / name
    if name.startswith("adapter") and not path.exists():
        path.write_text(json.dumps({"base_model_name_or_path": "x", "peft_type": "LORA"}))
    if name.endswith("index.json") and not path.exists() and not directory_faults(directory):
        names = stored_tensors(directory / "model.safetensors") if luck.random() < 0.9 else ("x",)
        (directory / "model.safetensors").rename(directory / "part.safetensors")
        places = dict.fromkeys(names, "part.safetensors")
        path.write_text(json.dumps({"metadata": {"total_size": 9}, "weight_map": places}))
    if not path.exists():
        return f"{name}: is not there"
    if name.endswith(".json") and luck.random() < 0.85 and (entries := parsed(path)):
        container, key = luck.choice(places_of(entries, []))
        value = luck.choice(ODD)
        if luck.random() < 0.2:
            del container[key]
        else:
            container[key] = value
        path.write_text(json.dumps(entries))
        return f"{name}: {key}={value!r}"
    content = bytearray(path.read_bytes())
    place = luck.randrange(len(content)) if content else 0
    if content and luck.random() < 0.5:
        content[place] = luck.randrange(256)
    else:
        del content[place:]
    path.write_bytes(bytes(content))
    return f"{name}: byte {place}"


def use(directory: Path) -> None:
    """What a run does with a directory, in its order."""
    from_directory(directory)
    check_directory(directory)
    tokenizer = load_tokenizer(directory)
    complete_tokenizer(tokenizer, chat_template=None)
    encode_prompt(tokenizer, (Message("user", "a b"),))
    encode_response(tokenizer, "b a")
    has_scalar_head(directory)
    load_causal_lm(directory, tokenizer, dtype=torch.float32, attention="sdpa")
    load_scalar_model(directory, tokenizer, dtype=torch.float32, attention="sdpa")


def test_fuzz(good: Path, tmp_path: Path) -> None:
    outcomes = {"loaded": 0, "refused": 0}
    for seed in range(int(os.environ.get("RLHF_FUZZ", "60"))):
        luck = random.Random(seed)
        directory = tmp_path / str(seed)
        shutil.copytree(good, directory)
        done = [mutate(directory, luck) for _ in range(luck.randint(1, 2))]
        try:
            use(directory)
            outcomes["loaded"] += 1
        except ConfigError as error:
            outcomes["refused"] += 1
            assert 10 < len(str(error)) < 3000, (seed, done)
        except BaseException as error:
            raise AssertionError(f"seed {seed}, {done}: {type(error).__name__}: {error}") from error
        shutil.rmtree(directory)
    print(outcomes)
    assert min(outcomes.values()) > 0


def test_a_run_tells_of_code_that_it_does_not_run(good: Path, tmp_path: Path) -> None:
    directory = changed(
        good, tmp_path / "model", "tokenizer_config.json", setting(auto_map={"AutoTokenizer": ["x", None]})
    )
    assert not list(code_notes(Config(model=ModelConfig(path=str(good)))))
    (note,) = code_notes(Config(model=ModelConfig(path=str(directory))))
    assert str(directory) in note and "never run" in note
