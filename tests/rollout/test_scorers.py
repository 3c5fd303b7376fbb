"""Scorers that read text: a user's function, exact answers, and a server that sometimes fails."""

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf.batch import PromptBatch, Rollout
from rlhf.config.errors import ConfigError, DataError
from rlhf.config.schema import ScorerConfig
from rlhf.rollout.score import TextScorer, WeightedScorer
from rlhf.rollout.scorers import checked_scores, score_function, scorer_kinds, scorer_problems
from rlhf.rollout.scorers.function import load_reference
from rlhf.rollout.scorers.gsm8k import final_number

LENGTHS = "def length(prompts, responses, **columns):\n    return [len(text) for text in responses]\n"


@pytest.fixture
def module(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(LENGTHS + "value = 3\n")
    return path


def test_a_function_of_a_file_scores(module: Path) -> None:
    config = ScorerConfig(kind="function", function=f"{module}:length")
    assert scorer_problems(config) == []
    assert score_function(config)(["a", "b"], ["four", "to"], answer=[1, 2]) == [4, 2]


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        (None, "give FILE.py:NAME or MODULE:NAME"),
        ("mine.py", "give FILE.py:NAME or MODULE:NAME"),
        ("{folder}/other.py:length", "other.py cannot be read"),
        ("{folder}/mine.py:width", "defines no width"),
        ("{folder}/broken.py:length", "is not valid Python"),
        ("no_such_module_here:length", "there is no module no_such_module_here"),
    ],
)
def test_a_wrong_reference_is_found_without_running_it(module: Path, reference: str | None, said: str) -> None:
    (module.parent / "broken.py").write_text("def (")
    given = reference.format(folder=module.parent) if reference else None
    (problem,) = scorer_problems(ScorerConfig(kind="function", function=given))
    assert problem.startswith(f"scorer.function={given}: ") and said in problem


def test_what_cannot_be_called_or_imported_is_refused(module: Path) -> None:
    with pytest.raises(ConfigError, match="has no function value"):
        load_reference(f"{module}:value", key="scorer.function")
    module.write_text("def length(): ...\nraise OSError('no disk')\n")
    with pytest.raises(ConfigError, match="importing it failed: OSError: no disk"):
        load_reference(f"{module}:length", key="scorer.function")


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ([1.0], "returned 1 scores for 2"),
        ([1.0, float("nan")], "returned nan for the response “yes”"),
        ([1, "x"], "failed"),
    ],
)
def test_a_function_that_returns_anything_but_one_number_each_is_an_error(returned: list[Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        checked_scores(lambda *_: returned, ["one?", "two?"], ["no", "yes"], {}, name="scorer=function")


def test_a_function_that_raises_is_an_error_with_its_reason() -> None:
    def broken(prompts: list[str], responses: list[str], **columns: object) -> list[float]:
        raise KeyError("price")

    with pytest.raises(DataError, match=r"scorer=function failed on 1 responses: KeyError: 'price'.*“one\?”"):
        checked_scores(broken, ["one?"], ["no"], {}, name="scorer=function")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("So 3 + 4 = 7.\n#### 7", "7"),
        ("The answer is $1,234.50.", "1234.50"),
        ("it is -5 degrees", "-5"),
        ("first 10, then 12 apples", "12"),
        ("#### 18 dollars, or 19", "18"),
        ("I do not know", None),
        ("½ of it", None),
    ],
)
def test_the_final_number_of_a_text(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else pytest.approx(float(number)))


def test_exact_answers_score_one() -> None:
    score = score_function(ScorerConfig(kind="gsm8k"))
    answers = ["5 + 5 = <<5+5=10>>10\n#### 10", "#### 1,000", "#### 3"]
    assert score(["a", "b", "c"], ["it makes 10.0", "exactly 1000.", "3 or 4"], answer=answers) == [1.0, 1.0, 0.0]
    with pytest.raises(DataError, match=r"column answer: set data\.sources\.NAME\.keep"):
        score(["a"], ["1"])
    with pytest.raises(DataError, match="has no number after ####"):
        score(["a"], ["1"], answer=["ten"])


@dataclass
class Judge:
    """A server that answers the length of each response, or what it is told to."""

    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[str | None] = field(default_factory=list)
    faults: list[tuple[int, bytes]] = field(default_factory=list)


@pytest.fixture
def judge() -> Iterator[Judge]:
    state = Judge()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.headers.append(self.headers["Authorization"])
            scores = [float(len(text)) for text in content["responses"]]
            code, answer = 200, json.dumps({"scores": scores}).encode()
            if state.faults:
                code, answer = state.faults.pop(0)
            if code == 0:
                self.connection.close()
                return
            if code == 200:
                state.asked.append(content)
            self.send_response(code)
            if code == 301:
                self.send_header("Location", "/v2/score?key=s3cret")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/score"
    yield state
    server.shutdown()
    server.server_close()


def test_a_server_is_asked_in_batches_and_again_after_faults(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_SCORER_TOKEN", "s3cret")
    judge.faults = [(503, b""), (0, b"")]
    config = ScorerConfig(kind="http", url=judge.url, batch_size=2, retries=3)
    assert scorer_problems(config) == []
    responses = ["a", "bb", "ccc", "dddd", "eeeee"]
    assert score_function(config)([f"{n}?" for n in range(5)], responses, answer=list("vwxyz")) == [1, 2, 3, 4, 5]
    assert [len(asked["responses"]) for asked in judge.asked] == [2, 2, 1]
    assert judge.asked[2] == {"prompts": ["4?"], "responses": ["eeeee"], "columns": {"answer": ["z"]}}
    assert set(judge.headers) == {"Bearer s3cret"}


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        ([(500, b"out of memory")] * 2, "answered with code 500: out of memory"),
        ([(404, b"no such path")], "answered with code 404: no such path"),
        ([(301, b"")], "/v2/score: set scorer.url to it"),
        ([(200, b"hello")], "answered 'hello' instead of"),
        ([(200, b'{"scores": [1.0]}')], "gave 1 scores for 2 responses"),
        ([(0, b"")] * 2, "no answer after 1 retries"),
    ],
)
def test_a_server_that_fails_is_one_clear_error(judge: Judge, faults: list[tuple[int, bytes]], said: str) -> None:
    judge.faults = faults
    score = score_function(ScorerConfig(kind="http", url=judge.url, retries=1))
    with pytest.raises(DataError) as raised:
        score(["a", "b"], ["one", "two"])
    assert str(raised.value).startswith(f"scorer.url={judge.url}: ") and said in str(raised.value)
    assert "s3cret" not in str(raised.value)


def test_wrong_addresses_and_kinds_are_found_before_anything_starts() -> None:
    assert "give the scorer's address" in scorer_problems(ScorerConfig(kind="http"))[0]
    for url in ("http://me:hunter2@host/", "http://host/?api_key=1"):
        (problem,) = scorer_problems(ScorerConfig(kind="http", url=url))
        assert "RLHF_SCORER_TOKEN" in problem and "hunter2" not in problem and "=1" not in problem
    for url in ("http://[bad/score", "http://host:80a/"):
        assert "is no address" in scorer_problems(ScorerConfig(kind="http", url=url))[0]
    assert scorer_kinds() == ["function", "gsm8k", "http", "reward_model"]
    assert "there are function, gsm8k, http, reward_model" in scorer_problems(ScorerConfig(kind="oracle"))[0]


def answered(count: int) -> tuple[PreTrainedTokenizerFast, PromptBatch, Rollout]:
    words = {word: number for number, word in enumerate(["<pad>", "</s>", "yes", "no"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    records = tuple(
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{n}?"}], "source": "s"}
        | ({"answer": n} if n else {})
        for n in range(count)
    )
    prompts = PromptBatch(
        prompt_ids=torch.full((count, 1), 2), prompt_mask=torch.ones(count, 1, dtype=torch.bool), records=records
    )
    sequences = torch.tensor([[2, 2 + n % 2, 1] for n in range(count)])
    mask = torch.ones(count, 2, dtype=torch.bool)
    return wrapped, prompts, Rollout(sequence_ids=sequences, prompt_mask=prompts.prompt_mask, response_mask=mask)


def test_texts_and_columns_reach_the_function() -> None:
    tokenizer, prompts, rollout = answered(3)
    seen: dict[str, Any] = {}

    def score(prompts: list[str], responses: list[str], **columns: list[Any]) -> list[float]:
        seen.update(prompts=prompts, responses=responses, columns=columns)
        return [0.5] * len(responses)

    scores = TextScorer(function=score, name="scorer=function", tokenizer=tokenizer)(prompts, rollout)
    assert scores.tolist() == [0.5] * 3 and scores.dtype == torch.float32
    assert seen["prompts"][2] == "Be brief.\n\n2?" and seen["responses"] == ["yes", "no", "yes"]
    assert seen["columns"] == {"answer": [None, 1, 2]}


def test_several_scorers_are_added_by_weight() -> None:
    _, prompts, rollout = answered(2)
    scorer = WeightedScorer(
        members=((2.0, lambda p, r: torch.tensor([1.0, 0.0])), (-0.5, lambda p, r: torch.tensor([2.0, 4.0])))
    )
    assert scorer(prompts, rollout).tolist() == [1.0, -2.0]
