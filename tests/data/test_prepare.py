"""Rows on disk: what goes into which part, what is dropped, and that a build is found again."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.errors import ConfigError, DataError
from rlhf.config.schema import (
    Config,
    DataConfig,
    ModelConfig,
    OnProblem,
    ScratchConfig,
    SourceConfig,
    SplitConfig,
    WeightSource,
)
from rlhf.data.conversation import Message
from rlhf.data.prepare import PreparedData, content_fingerprint, prepare_data, training_texts
from rlhf.data.split import ALL_PARTS, PTX, assign
from rlhf.models.tokenizer import encode_prompt, encode_response, load_tokenizer, prepare_tokenizer
from rlhf.stages.pipeline.config import PipelineConfig
from rlhf.stages.ppo.config import PPOConfig
from rlhf.stages.preflight import preflight
from rlhf.stages.rm.config import RMConfig
from rlhf.stages.sft.config import SFTConfig

MODEL = ModelConfig(name="mini", source=WeightSource.scratch, scratch=ScratchConfig(vocab_size=300))
ALL_RM = SplitConfig(sft=0, rm=1, ppo=0, held_out=0)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = ["answer number one two three"] * 5
    cache_dir = tmp_path_factory.mktemp("tokenizer")
    return prepare_tokenizer(MODEL, texts=lambda: iter(texts), fingerprint="x", cache_dir=cache_dir)


def pair(number: int, **changes: Any) -> dict[str, Any]:
    return {"prompt": f"prompt {number}", "chosen": f"good {number}", "rejected": f"bad {number}", **changes}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def mix(path: Path, **changes: Any) -> DataConfig:
    return DataConfig(name="files", sources={"main": SourceConfig(path=str(path))}, **changes)


@pytest.fixture()
def many(tmp_path: Path) -> Path:
    return write(tmp_path / "many.jsonl", [pair(n) for n in range(400)] + [pair(n, chosen="other") for n in range(50)])


def test_parts_hold_what_their_stage_needs(many: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    data = mix(many, split=SplitConfig(held_out=0.2))
    prepared = prepare_data(data, tokenizer_dir=tokenizer_dir, cache_dir=tmp_path)
    tokenizer = load_tokenizer(tokenizer_dir)
    prompts: dict[str, set[str]] = {}
    for part in (part for part in ALL_PARTS if part.stage != PTX):
        rows = list(prepared.part(part.stage, part.held_out))
        prompts[part.label] = {row["prompt_text"] for row in rows}
        assert prepared.counts["parts"][part.label]["rows"] == len(rows) > 0
        for row in rows:
            messages = (Message("user", row["prompt_text"]),)
            home = assign(messages, data.split)
            assert home == part or (home.held_out and part.held_out)  # Held-out prompts serve every stage.
            assert row["prompt_ids"] == encode_prompt(tokenizer, messages)
            assert row["chosen_ids"] == encode_response(tokenizer, row["chosen_text"])
            assert (row["rejected_ids"] is None) == (part.stage == "sft")
            if part.stage != "sft":
                assert row["rejected_ids"] == encode_response(tokenizer, row["rejected_text"])
            assert row["chosen_truncated"] is row["rejected_truncated"] is False
        if part.stage == "ppo":
            assert len(prompts[part.label]) == len(rows)
    held_out = prompts.pop("sft_held_out")
    assert held_out == prompts.pop("rm_held_out") == prompts.pop("ppo_held_out")
    assert sum(len(found) for found in [held_out, *prompts.values()]) == 400
    assert len(set().union(held_out, *prompts.values())) == 400
    assert prepared.counts["template"] == []
    assert prepared.counts["read"] == {"main": 450}


def test_sft_on_rejected_makes_rows_of_both_answers(many: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    split = SplitConfig(sft=1, rm=0, ppo=0, held_out=0)
    texts = {}
    for both in (False, True):
        data = mix(many, split=split, sft_on_rejected=both)
        prepared = prepare_data(data, tokenizer_dir=tokenizer_dir, cache_dir=tmp_path)
        texts[both] = sorted(prepared.part("sft", False)["chosen_text"])
    assert len(texts[False]) == 450
    assert texts[True] == sorted(texts[False] + [f"bad {n}" for n in range(400)])  # Each answer to a prompt once.


def test_truncated_answers_keep_no_eos_and_leave_the_reward_model(tokenizer_dir: Path, tmp_path: Path) -> None:
    rows = [pair(0), pair(1, chosen="long " * 20), pair(2, rejected="long " * 20)]
    path = write(tmp_path / "rows.jsonl", rows)
    rm = prepare_data(mix(path, max_response_length=12, split=ALL_RM), tokenizer_dir=tokenizer_dir, cache_dir=tmp_path)
    assert rm.part("rm", False)["prompt_text"][:] == ["prompt 0"]
    assert rm.counts["dropped"] == {"rm: an answer is truncated": 2}
    assert rm.counts["truncated"] == {"rm_train chosen": 1, "rm_train rejected": 1}
    listed = [json.loads(line) for line in rm.problems_file.read_text().splitlines()]
    assert {(line["problem"], line["where"]) for line in listed} >= {
        ("rm: an answer is truncated", f"{path}:2"),
        ("rm: an answer is truncated", f"{path}:3"),
    }
    only_sft = mix(path, max_response_length=12, split=SplitConfig(sft=1, rm=0, ppo=0, held_out=0))
    sft = prepare_data(only_sft, tokenizer_dir=tokenizer_dir, cache_dir=tmp_path).part("sft", False)
    eos = load_tokenizer(tokenizer_dir).eos_token_id
    truncated = {row["prompt_text"]: row for row in sft if row["chosen_truncated"]}
    assert set(truncated) == {"prompt 1"}
    assert len(truncated["prompt 1"]["chosen_ids"]) == 12 and eos not in truncated["prompt 1"]["chosen_ids"]
    assert all(row["chosen_ids"][-1] == eos for row in sft if not row["chosen_truncated"])


def test_a_long_prompt_stops_or_is_skipped(tokenizer_dir: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [pair(0), pair(1, prompt="very long prompt " * 9)])
    data = mix(path, max_prompt_length=40, split=ALL_RM)
    with pytest.raises(DataError) as raised:
        prepare_data(data, tokenizer_dir=tokenizer_dir, cache_dir=tmp_path)
    assert f"main, {path}:2:" in str(raised.value) and "data.on_long_prompt=skip" in str(raised.value)
    assert [entry for entry in (tmp_path / "data").iterdir() if entry.is_dir()] == []
    data.on_long_prompt = OnProblem.skip
    prepared = prepare_data(data, tokenizer_dir=tokenizer_dir, cache_dir=tmp_path)
    assert prepared.counts["dropped"] == {"prompt too long": 1}
    assert len(prepared.part("rm", False)) == 1


def test_bad_rows_are_counted_when_skipped(tokenizer_dir: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [pair(0), {"prompt": "p"}])
    data = mix(path, on_bad_row=OnProblem.skip, split=ALL_RM)
    prepared = prepare_data(data, tokenizer_dir=tokenizer_dir, cache_dir=tmp_path)
    assert prepared.counts["dropped"] == {"bad row": 1}
    assert f"{path}:2" in prepared.problems_file.read_text()


def test_an_empty_part_is_explained(tokenizer_dir: Path, tmp_path: Path) -> None:
    data = mix(write(tmp_path / "rows.jsonl", [pair(0)]), split=ALL_RM)
    prepared = prepare_data(data, tokenizer_dir=tokenizer_dir, cache_dir=tmp_path)
    with pytest.raises(DataError, match=r"held-out part of stage rm has no pairs .* raise data\.split\.held_out"):
        prepared.part("rm", True)
    with pytest.raises(DataError, match=r"training part of stage sft has no rows .* raise data\.split\.sft"):
        prepared.part("sft", False)
    with pytest.raises(ConfigError, match=r"data\.sources is empty"):
        content_fingerprint(DataConfig())


def test_prompts_alone_serve_ppo_only(tokenizer_dir: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": f"p{n}"} for n in range(60)])
    source = SourceConfig(path=str(path), format="prompt")
    prepared = prepare_data(DataConfig(sources={"main": source}), tokenizer_dir=tokenizer_dir, cache_dir=tmp_path)
    rows = prepared.part("ppo", False)
    assert rows["chosen_ids"][:] == [None] * len(rows)
    sizes = {label: part["rows"] for label, part in prepared.counts["parts"].items()}
    assert sizes["sft_train"] == sizes["rm_train"] == 0
    assert sum(prepared.counts["dropped"].values()) + sizes["ppo_train"] + sizes["ppo_held_out"] == 60


def test_weights_mix_the_training_parts_of_two_sources(many: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other.jsonl", [pair(n) for n in range(1000, 1100)])
    sources = {
        "main": SourceConfig(path=str(many), weight=1.0),
        "other": SourceConfig(path=str(other), weight=1.0),
    }
    data = DataConfig(sources=sources, split=ALL_RM)
    prepared = prepare_data(data, tokenizer_dir=tokenizer_dir, cache_dir=tmp_path)
    assert prepared.counts["parts"]["rm_train"]["sources"] == {"main": 100, "other": 100}
    assert prepared.counts["mix"] == ["rm_train: 100 of 450 rows of main are used at its weight"]
    rows = prepared.part("rm", False)["source"][:]
    assert 20 < sum(source == "main" for source in rows[:100]) < 80


def test_the_fingerprint_follows_content_options_and_tokenizer(many: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    def prepared(data: DataConfig, tokenizer: Path = tokenizer_dir) -> PreparedData:
        return prepare_data(data, tokenizer_dir=tokenizer, cache_dir=tmp_path)

    first = prepared(mix(many))
    marker = first.directory / "marker"
    marker.touch()
    copy = tmp_path / "elsewhere" / "many.jsonl"
    copy.parent.mkdir()
    copy.write_bytes(many.read_bytes())
    assert prepared(mix(copy)).fingerprint == first.fingerprint
    assert marker.exists()
    smaller = prepare_tokenizer(
        ModelConfig(name="m", source=WeightSource.scratch, scratch=ScratchConfig(vocab_size=265)),
        texts=lambda: iter(["answer number one two three"] * 5),
        fingerprint="x",
        cache_dir=tmp_path,
    )
    variants = [
        prepared(mix(many, max_response_length=99)),
        prepared(mix(many, split=SplitConfig(seed=1))),
        prepared(mix(many, sft_on_rejected=True)),
        prepared(mix(many), smaller),
    ]
    copy.write_text(copy.read_text() + json.dumps(pair(9999)) + "\n")
    variants.append(prepared(mix(copy)))
    assert len({first.fingerprint, *(variant.fingerprint for variant in variants)}) == 6


def test_tokenizer_texts_are_those_of_sft_training(many: Path) -> None:
    data = mix(many, split=SplitConfig(held_out=0.3))
    texts = list(training_texts(data))
    prompts = {text for text in texts if text.startswith("prompt")}
    assert prompts == {
        f"prompt {n}" for n in range(400) if assign((Message("user", f"prompt {n}"),), data.split) == ALL_PARTS[0]
    }
    numbers = {text.split()[1] for text in prompts}
    assert {text.split()[1] for text in texts if text.startswith("bad")} == numbers


PARALLEL = """
import sys
from pathlib import Path
from rlhf.config.schema import DataConfig, SourceConfig
from rlhf.data.prepare import prepare_data
path, tokenizer_dir, cache_dir = sys.argv[1:]
data = DataConfig(name="files", sources={"main": SourceConfig(path=path)})
print(prepare_data(data, tokenizer_dir=Path(tokenizer_dir), cache_dir=Path(cache_dir)).directory)
print("torch" in sys.modules)
"""


@pytest.mark.processes
def test_processes_that_ask_at_once_share_one_build_without_torch(
    many: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", PARALLEL, str(many), str(tokenizer_dir), str(tmp_path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert outputs[0] == outputs[1] and outputs[0].endswith("False\n")
    assert len([entry for entry in (tmp_path / "data").iterdir() if entry.is_dir()]) == 1


def config(stage: Any, data: DataConfig, cache_dir: Path, **changes: Any) -> Config:
    return Config(stage=stage, model=MODEL, reward_model=MODEL, data=data, cache_dir=str(cache_dir), **changes)


@pytest.mark.processes
def test_preflight_gives_ranks_the_same_paths(many: Path, tmp_path: Path) -> None:
    data = mix(many, split=SplitConfig(held_out=0.2))
    stage = PipelineConfig(sft=SFTConfig(batch_size=8), rm=RMConfig(batch_size=8), ppo=PPOConfig(rollout_batch_size=8))
    first = preflight(config(stage, data, tmp_path))
    assert preflight(config(stage, data, tmp_path)) == first
    assert first.reward_tokenizer_dir == first.tokenizer_dir
    saved = tmp_path / "run" / "model"
    load_tokenizer(first.tokenizer_dir).save_pretrained(str(saved))
    trained = PPOConfig(actor_model=str(saved), reward_model=str(saved), rollout_batch_size=8)
    second = preflight(config(trained, data, tmp_path))
    assert second.tokenizer_dir == second.reward_tokenizer_dir == saved
    assert second.data == first.data
    assert preflight(config(RMConfig(sft_model=str(saved), batch_size=8), data, tmp_path)).tokenizer_dir == saved


def test_preflight_refuses_too_few_rows(many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = mix(many, split=SplitConfig(held_out=0.2))
    with pytest.raises(DataError, match=r"stage rm has \d+ rows, fewer than one batch of 5000"):
        preflight(config(RMConfig(batch_size=5000), data, tmp_path))
    small = mix(write(tmp_path / "few.jsonl", [pair(0)]), split=ALL_RM)
    with pytest.raises(DataError, match="held-out part of stage rm"):
        preflight(config(RMConfig(batch_size=1), small, tmp_path))
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "from_environment"))
    prepared = preflight(Config(stage=SFTConfig(batch_size=8), model=MODEL, reward_model=MODEL, data=data))
    assert prepared.cache_dir == tmp_path / "from_environment"


def test_preflight_names_the_source_of_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.sources\.main\.path=.*none\.jsonl does not exist"):
        preflight(config(SFTConfig(), mix(tmp_path / "none.jsonl"), tmp_path))
