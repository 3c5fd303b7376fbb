"""When two stages are the same: what their key depends on, and what not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.schema import (
    Config,
    DataConfig,
    HardwareConfig,
    LauncherConfig,
    MemoryConfig,
    ModelConfig,
    Precision,
    RolloutConfig,
    ScorerConfig,
    SourceConfig,
    WeightSource,
)
from rlhf.stages.inputs import stage_inputs, stage_key
from rlhf.stages.ppo.config import PPOConfig
from rlhf.stages.rm.config import RMConfig
from rlhf.stages.sft.config import SFTConfig


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    return path


def config(rows: Path, **changes: object) -> Config:
    model = ModelConfig(name="tiny", source=WeightSource.scratch)
    base = Config(
        stage=SFTConfig(),
        model=model,
        reward_model=model,
        data=DataConfig(name="files", sources={"main": SourceConfig(path=str(rows))}),
        memory=MemoryConfig(zero_stage=1, precision=Precision.fp32),
        hardware=HardwareConfig(gpus_per_node=2, threads_per_rank=1),
        run_dir="/runs/a",
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def test_what_does_not_train_does_not_matter(rows: Path) -> None:
    key = stage_key(config(rows))
    assert key.startswith("sft-")
    same = [
        config(rows, run_dir="/runs/b"),
        config(rows, launcher=LauncherConfig(master_port=1234)),
        config(rows, rollout=RolloutConfig(temperature=0.7)),
        config(rows, hardware=HardwareConfig(gpus_per_node=2, threads_per_rank=4)),
        config(rows, stage=SFTConfig(objective="eval/perplexity")),
        config(rows, reward_model=ModelConfig(name="other")),
        config(rows, data=replace(config(rows).data, judge="film_reviews", workers=3)),
    ]
    assert {stage_key(other) for other in same} == {key}
    moved = rows.with_name("moved.jsonl")
    moved.write_bytes(rows.read_bytes())
    assert stage_key(config(moved)) != key  # A file's name may decide how it is read.


def test_what_trains_matters(rows: Path) -> None:
    key = stage_key(config(rows))
    others = [
        config(rows, seed=2),
        config(rows, stage=SFTConfig(epochs=2.0)),
        config(rows, memory=MemoryConfig(zero_stage=2, precision=Precision.fp32)),
        config(rows, hardware=HardwareConfig(gpus_per_node=1)),
        config(rows, model=ModelConfig(name="tiny", source=WeightSource.scratch, chat_template="x")),
        config(rows, data=replace(config(rows).data, max_prompt_length=9)),
        config(rows, launcher=LauncherConfig(environment={"NVIDIA_TF32_OVERRIDE": "1"})),
    ]
    keys = [stage_key(other) for other in others]
    rows.write_text('{"prompt": "a", "chosen": "b", "rejected": "d"}\n')
    keys.append(stage_key(config(rows)))
    assert len({key, *keys}) == len(keys) + 1


def test_parents_count_by_their_bytes_not_by_their_place(rows: Path, tmp_path: Path) -> None:
    for name, weights in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(weights)
    first, same, other = (stage_key(config(rows, stage=RMConfig(sft_model=str(tmp_path / name)))) for name in "abc")
    assert first == same != other


def test_a_hub_model_counts_by_the_commit_in_the_cache(rows: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    hub = config(rows, model=ModelConfig(name="opt125m", path="facebook/opt-125m"))
    keys = [stage_key(hub)]
    for commit in ("a" * 40, "b" * 40):
        folder = tmp_path / "models--facebook--opt-125m"
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "snapshots" / commit / "config.json").write_text("{}")
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(commit)
        keys.append(stage_key(hub))
    assert len(set(keys)) == 3


def test_sampling_matters_to_ppo_only(rows: Path) -> None:
    warm = RolloutConfig(temperature=0.7)
    assert stage_key(config(rows, stage=RMConfig(), rollout=warm)) == stage_key(config(rows, stage=RMConfig()))
    assert stage_key(config(rows, stage=PPOConfig(), rollout=warm)) != stage_key(config(rows, stage=PPOConfig()))


def test_a_function_of_the_users_own_counts_by_its_content(rows: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def score(prompts, responses): return [0.0] * len(responses)\n")

    def key(**scorer: object) -> str | None:
        return stage_key(config(rows, stage=PPOConfig(), scorer=ScorerConfig(**scorer)))  # type: ignore[arg-type]

    before = key(kind="function", function=f"{path}:score")
    assert key(kind="function", function=f"{path}:score") == before
    path.write_text("def score(prompts, responses): return [1.0] * len(responses)\n")
    assert key(kind="function", function=f"{path}:score") != before
    # What a server answers is not known, so that its stage is never kept nor taken over.
    assert key(kind="http", url="http://127.0.0.1/") is None


def test_what_changed_is_known_by_its_kind(rows: Path, tmp_path: Path) -> None:
    model, score = tmp_path / "sft", tmp_path / "mine.py"
    model.mkdir()

    def changed(write: Path, text: str) -> list[str]:
        scorer = ScorerConfig(kind="function", function=f"{score}:score")
        used = config(rows, stage=PPOConfig(actor_model=str(model)), scorer=scorer)
        before = stage_inputs(used)
        write.write_text(text)
        after = stage_inputs(used)
        return [name for name in before if before[name] != after[name]]

    assert changed(rows, '{"prompt": "x", "chosen": "y", "rejected": "z"}\n') == ["data"]
    assert changed(model / "model.safetensors", "1") == ["weights"]
    assert changed(score, "def score(prompts, responses): ...\n") == ["code"]
    assert changed(tmp_path / "notes.txt", "") == []
    gone = stage_inputs(config(rows, stage=RMConfig(sft_model=str(tmp_path / "gone"))))
    assert gone["weights"] != stage_inputs(config(rows, stage=RMConfig(sft_model=str(model))))["weights"]
    first, other = (stage_inputs(config(rows, seed=seed)) for seed in (1, 2))
    assert [name for name in first if first[name] != other[name]] == ["options"]
