"""Where a reward model's score is read: by training, by the usual way of transformers, by `rlhf.score`, and by PPO."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from published import FAMILIES, tokenizer_of
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

import rlhf
from rlhf.batch import PromptBatch, Rollout
from rlhf.config.errors import ConfigError, DataError
from rlhf.config.schema import Config, ModelConfig, Normalize, ScorerConfig
from rlhf.data.collate import collate_pairs
from rlhf.data.conversation import Message
from rlhf.models.load import load_scalar_model
from rlhf.models.score_rule import (
    closed,
    read_score_rule,
    score_tail,
    usual_way_agrees,
    weights_digest,
    write_score_rule,
)
from rlhf.models.tokenizer import encode_prompt, encode_response, load_tokenizer
from rlhf.rollout.forward import sequence_scores
from rlhf.rollout.score import RewardModelScorer
from rlhf.stages.best_of_n.config import BestOfNConfig
from rlhf.stages.preflight import check_tail
from rlhf.stages.rm.config import RMConfig
from rlhf.stages.start import statistics_problems

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Ends an answer with EOS alone, and with no EOS at all.
PLAIN = "{% for m in messages %}{{ m['role'] + '\\n' + m['content'] + '<|im_end|>' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'assistant\\n' }}{% endif %}"
)
ENDLESS = "{% for m in messages %}{{ m['role'] + '\\n' + m['content'] }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'assistant\\n' }}{% endif %}"
)
WORDS = ["<unk>", "<|im_start|>", "<|im_end|>", "<|pad|>", "\n", "user", "assistant", "Red.", "Blue.", "colour?"]
CONVERSATIONS = [
    [{"role": "user", "content": "colour?"}, {"role": "assistant", "content": answer}]
    for answer in ("Red.", "Blue.", "Red. Blue. Red.")
]


def make_reward_model(folder: Path, template: str = CHATML) -> Path:
    """A few thousand weights whose score differs from token to token."""
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        unk_token="<unk>",
        extra_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = template
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=len(WORDS),
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.5,
        pad_token_id=3,
        num_labels=1,
        **sizes,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_score_rule(folder, tokenizer, mean=0.5, std=2.0)
    return folder


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_reward_model(tmp_path_factory.mktemp("chatml"))


def usual_way(directory: Path) -> list[float]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    scores = []
    for messages in CONVERSATIONS:
        inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            scores.append(float(model(**inputs).logits[0, 0]))
    return scores


def trained_position(directory: Path) -> list[float]:
    """The scores that stage=rm trains: through its own collation."""
    tokenizer = load_tokenizer(directory)
    model = load_scalar_model(directory, tokenizer, dtype=torch.float32, attention="sdpa").eval()
    prompt = encode_prompt(tokenizer, (Message("user", "colour?"),))
    answers = [encode_response(tokenizer, turns[-1]["content"]) for turns in CONVERSATIONS]
    rows = [{"prompt_ids": prompt, "chosen_ids": ids, "rejected_ids": answers[0]} for ids in answers]
    batch = collate_pairs(rows, pad_id=3, tail=score_tail(tokenizer))
    with torch.no_grad():
        return sequence_scores(model, batch.chosen_ids, batch.chosen_mask).tolist()


@pytest.mark.parametrize(("template", "tail"), [(CHATML, ["\n"]), (PLAIN, [])])
def test_the_usual_way_reads_what_training_trains(template: str, tail: list[str], tmp_path: Path) -> None:
    directory = make_reward_model(tmp_path, template)
    tokenizer = load_tokenizer(directory)
    assert tokenizer.convert_ids_to_tokens(list(score_tail(tokenizer))) == tail
    assert usual_way_agrees(tokenizer)
    raw = usual_way(directory)
    assert max(raw) - min(raw) > 0.1
    assert trained_position(directory) == pytest.approx(raw, abs=1e-5)
    assert rlhf.score(directory, CONVERSATIONS, normalize=False, batch_size=2) == pytest.approx(raw, abs=1e-5)
    assert rlhf.score(directory, CONVERSATIONS) == pytest.approx([(one - 0.5) / 2.0 for one in raw], abs=1e-5)


# Qwen3 puts an empty thought before an answer, Zephyr a line break: training has neither.
@pytest.mark.parametrize("name", FAMILIES)
def test_a_card_claims_agreement_only_where_all_tokens_agree(name: str) -> None:
    tokenizer = tokenizer_of(name)
    turns = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": "An answer."}]
    usual = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
    prompt = encode_prompt(tokenizer, (Message("user", "A question?"),))
    ours = [*prompt, *encode_response(tokenizer, "An answer."), *score_tail(tokenizer)]
    assert usual_way_agrees(tokenizer) == (usual == ours)
    assert usual_way_agrees(tokenizer) == (name not in ("qwen3", "qwen3-base", "zephyr"))


def test_messages_are_scored_as_training_reads_them(directory: Path) -> None:
    parts = [{"type": "text", "text": "Red."}]
    plain, others = ([{"role": "user", "content": "colour?"}, {"role": "assistant", "content": "Red."}] for _ in "ab")
    others[1] = {"from": "gpt", "value": parts, "id": "7"}
    assert rlhf.score(directory, [plain]) == rlhf.score(directory, [others])
    with pytest.raises(ConfigError, match=r"conversation 2: message 1 has no role"):
        rlhf.score(directory, [plain, [{"content": "x"}, plain[1]]])


def test_where_a_template_writes_no_eos_the_card_says_so_and_the_function_is_right(tmp_path: Path) -> None:
    directory = make_reward_model(tmp_path, ENDLESS)
    assert not usual_way_agrees(load_tokenizer(directory))
    assert "Use `rlhf.score` instead" in (directory / "README.md").read_text()
    raw = trained_position(directory)
    assert rlhf.score(directory, CONVERSATIONS, normalize=False) == pytest.approx(raw, abs=1e-5)
    assert usual_way(directory) != pytest.approx(raw, abs=0.1)


def test_the_snippet_of_the_card_runs_and_that_of_the_documentation_is_the_same(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(directory)
    card = (directory / "README.md").read_text()
    assert "instead" not in card
    (snippet,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(snippet, names)
    messages = names["messages"]
    assert names["score"] == pytest.approx(rlhf.score(directory, [messages])[0], abs=1e-4)
    page = (Path(__file__).resolve().parents[2] / "docs" / "algorithms.md").read_text(encoding="utf-8")
    assert snippet.replace('directory = "."  # this one', 'directory = "RUN/rm/model"') in page


def scorer_of(directory: Path) -> RewardModelScorer:
    tokenizer = load_tokenizer(directory)
    return RewardModelScorer(
        engine=_Engine(directory),
        rule=read_score_rule(directory, tokenizer, normalize=True),
        micro_batch_size=2,
        tokenizer=tokenizer,
        reward_tokenizer=None,
    )


class _Engine:
    """A model called as DeepSpeed's engines are."""

    def __init__(self, directory: Path) -> None:
        self.module = load_scalar_model(
            directory, load_tokenizer(directory), dtype=torch.float32, attention="sdpa"
        ).eval()

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)


def rollout_of(directory: Path, answers: list[list[int]], ended: list[bool]) -> tuple[PromptBatch, Rollout]:
    prompt = encode_prompt(load_tokenizer(directory), (Message("user", "colour?"),))
    width = max(len(ids) for ids in answers)
    prompt_ids = torch.tensor([[3, *prompt]] * len(answers))  # Padded on the left.
    prompt_mask = torch.tensor([[False] + [True] * len(prompt)] * len(answers))
    response_mask = torch.tensor([[place < len(ids) for place in range(width)] for ids in answers])
    responses = torch.tensor([[*ids, *[3] * (width - len(ids))] for ids in answers])
    return PromptBatch(prompt_ids=prompt_ids, prompt_mask=prompt_mask), Rollout(
        sequence_ids=torch.cat([prompt_ids, responses], dim=1),
        prompt_mask=prompt_mask,
        response_mask=response_mask,
        ended=torch.tensor(ended),
    )


def test_rollouts_are_scored_as_the_conversations_that_they_become(directory: Path) -> None:
    tokenizer, scorer = load_tokenizer(directory), scorer_of(directory)
    answers = [encode_response(tokenizer, turns[-1]["content"]) for turns in CONVERSATIONS]
    scores = scorer(*rollout_of(directory, answers, [True] * 3))
    assert scores.tolist() == pytest.approx(rlhf.score(directory, CONVERSATIONS), abs=1e-5)


def test_an_answer_that_was_cut_off_is_scored_at_its_last_token(directory: Path) -> None:
    tokenizer, scorer = load_tokenizer(directory), scorer_of(directory)
    cut = encode_response(tokenizer, "Red. Blue.")[:-1]
    (score,) = scorer(*rollout_of(directory, [cut], [False])).tolist()
    ids = torch.tensor([[*encode_prompt(tokenizer, (Message("user", "colour?"),)), *cut]])
    with torch.no_grad():
        scalars = scorer.engine.module(ids, torch.ones_like(ids).bool(), torch.arange(ids.shape[1]).unsqueeze(0))
    assert score == pytest.approx((float(scalars[0, -1]) - 0.5) / 2.0, abs=1e-5)


def test_an_answer_that_something_else_ended_is_closed_with_eos(directory: Path) -> None:
    tokenizer, scorer = load_tokenizer(directory), scorer_of(directory)
    red = encode_response(tokenizer, "Red.")
    other = [*red[:-1], tokenizer.convert_tokens_to_ids("<|im_start|>")]  # As a token of rollout.stop_tokens does.
    scores = scorer(*rollout_of(directory, [red, other, red[:-1]], [True] * 3)).tolist()
    assert scores == pytest.approx([rlhf.score(directory, CONVERSATIONS[:1])[0]] * 3, abs=1e-5)
    assert closed([5, 9], eos_id=2, ends=frozenset({9}), tail=(4,)) == [5, 2, 4]
    assert closed([5, 2], eos_id=2, ends=frozenset({9}), tail=()) == [5, 2]


def test_what_does_not_fit_the_model_is_told(directory: Path) -> None:
    long = [[*CONVERSATIONS[0][:1], {"role": "assistant", "content": "Red. " * 40}]]
    with pytest.raises(ConfigError, match="conversation 1 has 51 tokens, but the model 32 positions"):
        rlhf.score(directory, long)
    with pytest.raises(DataError, match="it has 32 positions"):
        scorer_of(directory)(*rollout_of(directory, [[7] * 26], [True]))
    with pytest.raises(ConfigError, match="conversation 2 does not end with an answer"):
        rlhf.score(directory, [CONVERSATIONS[0], CONVERSATIONS[0][:1]])
    config = Config(stage=RMConfig(sft_model=str(directory)), model=ModelConfig(path=str(directory)))
    config.data.max_prompt_length, config.data.max_response_length = 16, 16
    with pytest.raises(ConfigError, match=r"has 33 tokens, but the reward model 32 positions"):
        check_tail(config, load_tokenizer(directory))
    config.data.max_response_length = 15
    check_tail(config, load_tokenizer(directory))


def test_the_numbers_are_bound_to_the_weights(directory: Path, tmp_path: Path) -> None:
    trained = tmp_path / "trained"
    shutil.copytree(directory, trained)
    weights = load_file(trained / "model.safetensors")
    save_file(dict(reversed(weights.items())), trained / "model.safetensors", metadata={"format": "pt"})
    assert weights_digest(trained) == weights_digest(directory)  # The same weights, written anew.
    assert rlhf.score(trained, CONVERSATIONS) == rlhf.score(directory, CONVERSATIONS)
    names = sorted(weights)
    (trained / "model.safetensors").unlink()
    for number, part in enumerate((names[:5], names[5:])):
        save_file({name: weights[name] for name in part}, trained / f"model-{number}.safetensors")
    assert weights_digest(trained) == weights_digest(directory)
    weights["score.weight"][0, 0] += 1e-3
    save_file(weights, trained / "model.safetensors", metadata={"format": "pt"})
    for number in range(2):
        (trained / f"model-{number}.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"measured on other weights .* trained further"):
        rlhf.score(trained, CONVERSATIONS)
    assert len(rlhf.score(trained, CONVERSATIONS, normalize=False)) == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"score_mean": None, "score_std": ...}, "config.json has no score_std, which stage=rm writes"),
        ({"score_mean": ..., "score_std": ..., "score_weights": ...}, "no score_mean, score_std, score_weights, which"),
        ({"score_std": 0}, "score_std the number 0; both must be numbers, the second above 0"),
        ({"score_mean": "0.5"}, "both must be numbers"),
        ({"score_std": True}, "both must be numbers"),
        ({"score_mean": 10**400}, "both must be numbers"),
    ],
)
def test_numbers_that_are_missing_or_wrong_are_told_before_anything_starts(
    directory: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    entries = {**json.loads((directory / "config.json").read_text()), **changes}
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in entries.items() if v is not ...}))
    for config in (
        Config(stage=BestOfNConfig(reward_model=str(tmp_path))),
        Config(stage=BestOfNConfig(), scorer=ScorerConfig(others=[str(tmp_path)])),
    ):
        (problem,) = statistics_problems(config)
        assert problem.startswith(("stage.reward_model=", "scorer.others=")) and said in problem
        assert "set scorer.normalize=running, or off" in problem
        config.scorer.normalize = Normalize.running
        assert not list(statistics_problems(config))


def test_a_rule_that_makes_no_sense_gives_way_to_the_templates(directory: Path, tmp_path: Path) -> None:
    tokenizer, entries = load_tokenizer(directory), json.loads((directory / "config.json").read_text())
    for tail in ([4, 4], [], [10**9], [-1], ["\n"], "4", None):
        (tmp_path / "config.json").write_text(json.dumps({**entries, "score_tail": tail}))
        usable = tail in ([4, 4], [])
        assert read_score_rule(tmp_path, tokenizer, normalize=False).tail == (tuple(tail) if usable else (4,))
