"""format=auto: which format rows are taken for, and what is said where that is unclear."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.errors import DataError
from rlhf.config.schema import DataConfig, OnProblem, SourceConfig
from rlhf.data.conversation import Conversation
from rlhf.data.problems import source_problems
from rlhf.data.sources import read_source, settled

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
ASKED, WORSE = TURNS[:1], [TURNS[0], {"role": "assistant", "content": "No."}]
SAID, UNSAID = "\n\nHuman: Hi\n\nAssistant: Hello.", "\n\nHuman: Hi\n\nAssistant: No."
PROMPT = "\n\nHuman: Hi\n\nAssistant:"


def rows_file(folder: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def taken(path: Path, **options: Any) -> tuple[str, list[str]]:
    source, notes = settled(SourceConfig(path=str(path), **options), name="main")
    return source.format, notes


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "preference"),
        ({"prompt": ASKED, "chosen": TURNS[1:], "rejected": WORSE[1:]}, "preference"),
        ({"chosen": TURNS, "rejected": WORSE, "score_chosen": 1, "score_rejected": 0}, "preference"),
        ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "preference"),
        ({"chosen": SAID, "rejected": UNSAID}, "transcript"),
        ({"prompt": PROMPT, "response": " Hello.", "chosen": " Hello.", "rejected": " No."}, "transcript"),
        ({"chosen": SAID}, "transcript"),
        ({"prompt": "p", "completion": "c"}, "completion"),
        ({"prompt": "p", "completion": "c", "label": True, "text": "p c"}, "completion"),
        ({"prompt": ASKED, "completion": TURNS[1:]}, "completion"),
        ({"messages": TURNS}, "conversational"),
        ({"messages": TURNS, "label": True}, "conversational"),
        (
            {"prompt": "Hi", "prompt_id": "x", "chosen": TURNS, "rejected": WORSE, "messages": TURNS}
            | {"score_chosen": 8.0, "score_rejected": 2.5},
            "preference",
        ),
        ({"text": "t", "label": 0}, "text"),
        ({"text": "t", "label": 1, "label_text": "pos"}, "text"),
        ({"prompt": "Hi", "prompt_id": "x", "messages": TURNS, "category": "QA"}, "conversational"),
        ({"messages": TURNS, "text": "Hi Hello."}, "conversational"),
        (
            {"id": 1, "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "A"}]},
            "conversational",
        ),
        ({"instruction": "i", "input": "", "output": "o", "text": "i o"}, "instruction"),
        ({"prompt": "p", "answer_0": "a", "answer_1": "b", "score_0": 1, "score_1": 2}, "scored_pair"),
        ({"prompt": "p", "topic": "t"}, "prompt"),
        ({"text": "t", "url": "u"}, "text"),
    ],
)
def test_rows_tell_their_format(row: dict[str, Any], form: str, tmp_path: Path) -> None:
    path = rows_file(tmp_path, *[row] * 3)
    found, notes = taken(path)
    assert found == form
    assert notes[-1].startswith(f"main: format={form}, for the columns ")
    source = SourceConfig(path=str(path))
    assert all(isinstance(one, Conversation) for one in read_source(source, name="main", on_bad_row=OnProblem.error))


def test_the_format_that_is_given_is_taken(tmp_path: Path) -> None:
    path = rows_file(tmp_path, {"prompt": "p", "chosen": "c", "rejected": "r"})
    assert taken(path, format="prompt") == ("prompt", [])


def test_columns_and_markers_narrow_the_choice(tmp_path: Path) -> None:
    path = rows_file(tmp_path, {"question": "q", "reply": "r", "text": "t"})
    assert taken(path, columns={"prompt": "question", "completion": "reply"}) == (
        "completion",
        ["main: format=completion, for the columns question, reply"],
    )
    marked = rows_file(tmp_path, {"chosen": "### Q: a ### A: b"})
    assert taken(marked, markers=["### Q:", "### A:"])[0] == "transcript"


def test_values_count_where_columns_do_not_tell(tmp_path: Path) -> None:
    broken = rows_file(tmp_path, *[{"prompt": "p", "chosen": "", "rejected": ""}] * 5)
    assert taken(broken)[0] == "preference"  # Their answers are told to be empty; they are no prompts for PPO.
    null = rows_file(tmp_path, {"messages": TURNS, "prompt": None, "completion": None})
    assert taken(null)[0] == "conversational"
    empty = rows_file(tmp_path, *[{"prompt": ""}] * 5, {"prompt": "p"})
    assert taken(empty)[0] == "prompt"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"prompt": "p", "chosen": "c", "rejected": "r", "messages": TURNS},
            "fit 2 formats, so say which is meant: data.sources.main.format=conversational reads messages; "
            "data.sources.main.format=preference reads",
        ),
        ({"prompt": "p", "text": "t"}, "fit 2 formats"),
        (
            {"question": "q", "answer": "a"},
            "as in  data.sources.main.format=completion +data.sources.main.columns.prompt=question "
            "+data.sources.main.columns.completion=answer",
        ),
        (
            {"prompt": "p", "response": "r"},
            "data.sources.main.format=completion +data.sources.main.columns.completion=",
        ),
        (
            {"system": "s", "question": "q", "chosen": "c", "rejected": "r"},
            "as in  data.sources.main.format=preference +data.sources.main.columns.prompt=question\n",
        ),
        (
            {"input": "q", "chosen": "c", "rejected": "r"},
            "as in  data.sources.main.format=preference +data.sources.main.columns.prompt=input\n",
        ),
        (
            {
                "input": {"messages": ASKED, "tools": []},
                "preferred_output": TURNS[1:],
                "non_preferred_output": WORSE[1:],
            },
            "as in  data.sources.main.format=preference +data.sources.main.columns.prompt=input.messages "
            "+data.sources.main.columns.chosen=preferred_output "
            "+data.sources.main.columns.rejected=non_preferred_output +data.sources.main.columns.tools=input.tools\n",
        ),
        (
            {"instruction": "i", "context": "", "response": "r", "category": "x"},
            "as in  data.sources.main.format=instruction +data.sources.main.columns.input=context "
            "+data.sources.main.columns.output=response\n",
        ),
        (
            {"system_prompt": "s", "question": "q", "response": "r"},
            "as in  data.sources.main.format=completion +data.sources.main.columns.prompt=question "
            "+data.sources.main.columns.completion=response +data.sources.main.columns.system=system_prompt\n",
        ),
        (
            {"question": "q", "response": "r", "label": False},
            "as in  data.sources.main.format=completion +data.sources.main.columns.prompt=question "
            "+data.sources.main.columns.completion=response\n",
        ),
        # What no format reads gets no proposal.
        ({"segments": [{"label": True, "text": "t"}]}, "data.sources.main.columns\n"),
        ({"conversation": [{"input": "q", "output": "a"}]}, "data.sources.main.columns\n"),
        ({"instruction": "i", "completions": [{"model": "m", "response": "r"}]}, "data.sources.main.columns\n"),
        ({"prompt": "p", "completions": ["a", "b"], "labels": [True, False]}, "data.sources.main.columns\n"),
        ({"dialogue": TURNS}, "data.sources.main.format=conversational +data.sources.main.columns.messages=dialogue"),
        ({"prompt": "p", "chosen": "c"}, "no format fits its rows, which have the columns prompt, chosen"),
        ({"\x1b]0;x\x07": "p"}, r"the columns \x1b]0;x\x07"),
    ],
)
def test_one_message_names_the_candidates(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = rows_file(tmp_path, *[row] * 2000)
    with pytest.raises(DataError) as raised:
        list(read_source(SourceConfig(path=str(path)), name="main", on_bad_row=OnProblem.error))
    assert said in str(raised.value)
    assert str(raised.value).count("data.sources.main:") == 1 and len(str(raised.value)) < 1500


def test_prompts_whose_answers_a_scorer_reads_are_prompts(tmp_path: Path) -> None:
    path = rows_file(tmp_path, {"prompt": "p", "answer": "a"})
    assert taken(path, keep=["answer"])[0] == "prompt"


def test_all_files_of_a_directory_count(tmp_path: Path) -> None:
    rows_file(tmp_path, {"prompt": "p", "completion": "c"}, name="a.jsonl")
    rows_file(tmp_path, {"completion": "c", "prompt": "p", "more": 1}, name="b.jsonl")
    rows_file(tmp_path, name="empty.jsonl")
    assert taken(tmp_path)[0] == "completion"
    rows_file(tmp_path, {"question": "q", "answer": "a"}, name="c.jsonl")
    with pytest.raises(DataError) as raised:
        taken(tmp_path)
    assert str(raised.value).split("\n") == [
        "data.sources.main: its files differ, and no format fits them all: give each kind a source of its own:",
        f"  {tmp_path}/a.jsonl: completion (prompt, completion)",
        f"  {tmp_path}/b.jsonl: completion (completion, prompt, more)",
        f"  {tmp_path}/c.jsonl: no format (question, answer)",
    ]


def test_columns_of_no_format_are_told_before_anything_is_read() -> None:
    data = DataConfig(sources={"main": SourceConfig(kind="hub", path="a/b", columns={"prompts": "x"})})
    assert list(source_problems(data)) == [
        "data.sources.main.columns: format=auto reads no column prompts: did you mean prompt?"
    ]
    data = DataConfig(sources={"main": SourceConfig(kind="hub", path="a/b", format="atuo")})
    assert "did you mean auto?" in "".join(source_problems(data))


def test_a_column_that_no_format_can_read_leaves_one_format(tmp_path: Path) -> None:
    path = rows_file(tmp_path, {"prompt": [{"role": "robot", "content": "x"}]})
    assert taken(path)[0] == "prompt"
    with pytest.raises(DataError, match="has the role 'robot'"):
        list(read_source(SourceConfig(path=str(path)), name="main", on_bad_row=OnProblem.error))
