"""Every format: what a row becomes, and what is said about one that is not as it should be."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hub_rows import HUB_ROWS, turns
from hydra import compose, initialize_config_dir

from rlhf.config.schema import OnProblem, SourceConfig
from rlhf.data.conversation import Conversation, Message, Refused
from rlhf.data.formats import conversations, format_module, format_names
from rlhf.data.sources import read_source
from rlhf.stages import from_composed, register_schemas

CONF = Path(__file__).parents[2] / "conf"
HI, YO, HELLO = ({"role": role, "content": text} for role, text in (("user", "hi"), ("assistant", "yo"), ("user", "x")))
SYSTEM = {"role": "system", "content": "be kind"}


def read(row: Any, form: str, **options: Any) -> Conversation | Refused:
    """What a format makes of one row."""
    source = SourceConfig(format=form, **options)
    (found,) = conversations([("here", row)], source, name="main")
    return found


NAMES = sorted(path.stem for path in (CONF / "source").glob("*.yaml") if path.stem not in ("file", "hub"))


@pytest.fixture(scope="module")
def sources() -> dict[str, SourceConfig]:
    """Every source of conf/source."""
    register_schemas()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("config", overrides=["~data", *(f"+source@data.sources.{name}={name}" for name in NAMES)])
    return from_composed(composed).data.sources


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_of_every_hub_source_become_conversations(
    name: str, suffix: str, sources: dict[str, SourceConfig], tmp_path: Path
) -> None:
    rows, expected = HUB_ROWS[name]
    path = tmp_path / f"rows{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    source = replace(sources[name], kind="file", path=str(path))
    found = list(read_source(source, name="it", on_bad_row=OnProblem.error))
    assert len(found) == len(expected)
    for conversation, wanted in zip(found, expected, strict=True):
        if wanted is None:
            assert isinstance(conversation, Refused)
            assert (conversation.reason, conversation.bad) == ("the scores tie", False)
            continue
        assert isinstance(conversation, Conversation)
        prompt, chosen, rejected, extra = wanted
        assert conversation.messages == turns(*prompt)
        assert (conversation.chosen, conversation.rejected, dict(conversation.extra)) == (chosen, rejected, extra)


@pytest.mark.parametrize(
    ("form", "row", "expected"),
    [
        ("preference", {"prompt": "p", "chosen": "a", "rejected": "b"}, (["p"], "a", "b")),
        ("preference", {"prompt": [SYSTEM, HI], "chosen": [YO], "rejected": "b"}, (["be kind", "hi"], "yo", "b")),
        ("preference", {"chosen": [HI, YO], "rejected": [HI, {**YO, "content": "no"}]}, (["hi"], "yo", "no")),
        ("conversational", {"messages": [SYSTEM, HI, YO, HELLO, YO]}, (["be kind", "hi", "yo", "x"], "yo", None)),
        (
            "conversational",
            {"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            (["q"], "a", None),
        ),
        ("completion", {"prompt": "p", "completion": "a"}, (["p"], "a", None)),
        ("completion", {"prompt": [HI], "completion": [YO]}, (["hi"], "yo", None)),
        ("instruction", {"instruction": "do", "input": "this", "output": "done"}, (["do\n\nthis"], "done", None)),
        (
            "instruction",
            {"instruction": "do", "input": "", "output": "done", "system": "s"},
            (["s", "do"], "done", None),
        ),
        (
            "scored_pair",
            {"prompt": "p", "answer_0": "a", "answer_1": "b", "score_0": "1", "score_1": 2},
            (["p"], "b", "a"),
        ),
        ("prompt", {"prompt": "p"}, (["p"], None, None)),
        ("text", {"text": "once"}, ([], "once", None)),
        (
            "transcript",
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
            (["a"], "b", "c"),
        ),
        ("transcript", {"prompt": "Human: a\n\nAssistant:", "chosen": "b"}, (["a"], "b", None)),
        (
            "transcript",
            {"prompt": "\n\nHuman: a\n\nAssistant:", "chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "c"},
            (["a"], "b", "c"),
        ),
        (
            "preference",
            {"chosen": "Name a colour: red it is.", "rejected": "Name a colour: rough."},
            (["Name a colour:"], " red it is.", " rough."),
        ),
        ("completion", {"prompt": "p", "completion": "a", "label": True}, (["p"], "a", None)),
    ],
)
def test_what_a_row_becomes(form: str, row: Any, expected: tuple[list[str], Any, Any]) -> None:
    found = read(row, form)
    assert isinstance(found, Conversation), found
    assert ([m.content for m in found.messages], found.chosen, found.rejected) == expected


@pytest.mark.parametrize(
    ("form", "row", "reason"),
    [
        ("preference", {"prompt": "p", "chosen": [HI, YO], "rejected": [HI]}, "must end with the assistant's message"),
        ("preference", {"chosen": [HI, YO], "rejected": [HELLO, YO]}, "must be the same conversation"),
        ("preference", {"prompt": [HI, YO], "chosen": "a", "rejected": "b"}, "ends with the assistant's message"),
        ("preference", {"prompt": [HI, SYSTEM, HI], "chosen": "a", "rejected": "b"}, "that is not the first"),
        ("preference", {"prompt": [], "chosen": "a", "rejected": "b"}, "must be a list of messages, not list"),
        ("conversational", {"messages": [HI]}, "must end with the assistant's message"),
        ("conversational", {"messages": [YO]}, "has no message"),
        ("conversational", {"messages": [HI, {**YO, "role": "robot"}]}, "message 2 has the role 'robot'"),
        ("conversational", {"messages": [HI, {"role": "assistant"}]}, "its content must be text, not NoneType"),
        ("conversational", {"messages": [HI, "yo"]}, "message 2 must be a mapping"),
        ("conversational", {"messages": "hi"}, "must be a list of messages, not 'hi'"),
        ("instruction", {"instruction": "do", "output": None}, '"output" is null'),
        ("scored_pair", {"prompt": "p", "answer_0": "a", "answer_1": "b", "score_0": "x", "score_1": 1}, "not 'x'"),
        (
            "scored_pair",
            {"prompt": "p", "answer_0": "a", "answer_1": "b", "score_0": float("nan"), "score_1": 1},
            "must be a finite number",
        ),
        ("transcript", {"prompt": "hello", "chosen": "b"}, "has no turn that begins with 'Human:'"),
        ("transcript", {"prompt": "x\n\nHuman: a", "chosen": "b"}, "text before the first"),
        ("transcript", {"prompt": "\n\nHuman:\n\nAssistant: b", "chosen": "c"}, "has an empty turn"),
        ("transcript", {"prompt": "\n\nHuman: a", "chosen": "Assistant: "}, '"chosen" is empty'),
        (
            "transcript",
            {"prompt": "\n\nHuman: a", "chosen": "\n\nHuman: z\n\nAssistant: b"},
            "begins with other turns than",
        ),
        ("preference", {"chosen": "yes", "rejected": "no"}, 'the column "prompt" is missing'),
        ("completion", {"prompt": "p", "completion": "a", "label": 0.5}, "must be true or false"),
        ("transcript", {"chosen": "\n\nHuman: a"}, "must end with the assistant's turn"),
        ("text", {"text": " "}, '"text" is empty'),
    ],
)
def test_what_is_wrong_with_a_row_is_said(form: str, row: Any, reason: str) -> None:
    found = read(row, form)
    assert isinstance(found, Refused) and found.bad
    assert reason in found.reason


def test_columns_may_be_called_otherwise_and_lie_deeper() -> None:
    row = {"q": {"text": "p"}, "a.b": "c", "alternatives": [{"text": "r"}]}
    columns = {"prompt": "q.text", "chosen": "a.b", "rejected": "alternatives.0.text"}
    found = read(row, "preference", columns=columns)
    assert isinstance(found, Conversation)
    assert (found.messages, found.chosen, found.rejected) == ((Message("user", "p"),), "c", "r")
    missing = read(row, "preference", columns={**columns, "rejected": "alternatives.1.text"})
    assert isinstance(missing, Refused)
    assert 'the column "alternatives.1.text" is missing' in missing.reason


def test_what_is_removed_may_not_be_all() -> None:
    found = read({"prompt": "p", "completion": "a [1] b [2, 3]"}, "completion", remove=r" ?\[[\d, ]+\]")
    assert isinstance(found, Conversation) and found.chosen == "a b"
    empty = read({"prompt": "p", "completion": "[1]"}, "completion", remove=r"\[1\]")
    assert isinstance(empty, Refused) and "is empty without" in empty.reason


def test_kept_columns_must_be_there() -> None:
    kept = read({"prompt": "p", "answer": 5}, "prompt", keep=["answer"])
    assert isinstance(kept, Conversation) and kept.extra == {"answer": 5}
    assert isinstance(read({"prompt": "p"}, "prompt", keep=["answer"]), Refused)


def test_every_format_says_what_it_reads() -> None:
    for name in format_names():
        module = format_module(name, key="x")
        assert module.COLUMNS and all(module.COLUMNS.values())
        assert (module.__doc__ or "").strip()
