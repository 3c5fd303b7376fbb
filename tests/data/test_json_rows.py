"""The ways in which rows of JSON stand in a file, whatever it is called, and JSON in the cells of tables."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from rlhf.config.errors import DataError
from rlhf.config.schema import OnProblem, SourceConfig
from rlhf.data.conversation import Conversation, Refused
from rlhf.data.readers import read_rows
from rlhf.data.sources import read_source

ROW = {"prompt": "p", "completion": "c"}
OTHER = {"prompt": "q", "completion": "c"}
LINE = json.dumps(ROW)
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello.", "weight": 1}]


def read(path: Path) -> tuple[list[str], list[str]]:
    source = SourceConfig(path=str(path), format="completion")
    found = list(read_source(source, name="main", on_bad_row=OnProblem.skip))
    bad = [f"{one.where}: {one.reason}".removeprefix(str(path)) for one in found if isinstance(one, Refused)]
    return [one.prompt_text for one in found if isinstance(one, Conversation)], bad


def rows_of(path: Path) -> list[Any]:
    return list(read_rows(path, source="main", limit=10**6))


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".jsonl.gz", ".json.gz"])
@pytest.mark.parametrize(
    "content",
    [
        f"{LINE}\n{json.dumps(OTHER)}\n",
        f"\n\n{LINE}\r\n\r\n{json.dumps(OTHER)}",
        f"\ufeff{LINE}\n{json.dumps(OTHER)}\n",
        json.dumps([ROW, OTHER]),
        json.dumps([ROW, OTHER], indent=2),
        f"\ufeff[\n{LINE},\n{json.dumps(OTHER)}\n]\n",
        f"{json.dumps(ROW, indent=2)}\n{json.dumps(OTHER, indent=2)}\n",
        json.dumps({"data": [ROW, OTHER]}),
        json.dumps({"version": "1.0", "data": [ROW, OTHER]}, indent=1),
        json.dumps({"my rows": [ROW, OTHER]}),
    ],
)
def test_content_tells_how_rows_stand_not_the_name(content: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{ending}"
    path.write_bytes(gzip.compress(content.encode()) if ending.endswith("gz") else content.encode())
    assert read(path) == (["p", "q"], [])


@pytest.mark.parametrize("ending", [".jsonl", ".json"])
def test_one_object_alone_is_a_row_unless_it_holds_rows(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{ending}"
    for row in ({**ROW, "data": ["x"]}, {**ROW, "sources": [{"url": "u"}]}, {"prompt": "p", "completion": TURNS[1:]}):
        for indent in (None, 1):
            path.write_text(json.dumps(row, indent=indent))
            assert read(path) == (["p"], [])
    path.write_text(json.dumps({"messages": TURNS}))
    assert rows_of(path) == [(f"{path}:1", {"messages": TURNS})]
    for columns in ({"prompt": ["a", "b"], "completion": ["c", "d"]}, {"prompt": {"0": "a"}, "completion": {"0": "b"}}):
        path.write_text(json.dumps(columns))
        with pytest.raises(DataError, match=r"holds columns, not rows: .*orient='records', lines=True"):
            read(path)


@pytest.mark.parametrize(
    ("content", "lists"),
    [
        ({"data": [ROW] * 4, "more": [OTHER] * 400}, "data, more"),
        ({"more": [OTHER] * 400, "data": [ROW] * 4}, "data, more"),
        ({"train": [ROW], "test": [OTHER, "x"]}, "train, test"),
        ({"examples": [ROW] * 2, "validation": [OTHER] * 20, "version": 1}, "examples, validation"),
        ({"data": [ROW], "train": [OTHER]}, "data, train"),
    ],
)
def test_rows_in_other_lists_are_not_lost(content: dict[str, Any], lists: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"rows\.json holds several lists of rows \({lists}\): save the one to"):
        read(path)
    # The same where the object is longer than a row may be.
    names = "|".join([lists, ", ".join(reversed(lists.split(", ")))])
    with pytest.raises(DataError, match=rf"several lists of rows \(({names})\)"):
        list(read_rows(path, source="main", limit=len(json.dumps(content)) - 10))


def test_a_long_object_without_rows_in_a_list_is_a_row_that_is_too_long(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"prompt": "p" * 60, "completion": "c" * 60}))
    (found,) = read_rows(path, source="main", limit=100)
    assert isinstance(found, Refused) and found.reason.startswith("longer than 100 bytes")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (f"{LINE},", "not valid JSON (a comma behind the object: a line holds an object alone)"),
        (f"{LINE} {LINE}", "not valid JSON (Extra data at character 36)"),
        ('{"prompt": "a', "not valid JSON (Unterminated string starting at character 12)"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"prompt": "p", "completion": "c", "n": ' + "9" * 5000 + "}", "a number in it has too many digits"),
        ('{"prompt": "p", "prompt": "q", "completion": "c"}', "the key 'prompt' occurs twice in an object"),
        ("x\0\0", "not valid JSON (Expecting value at character 1)"),
    ],
)
def test_a_broken_line_is_a_bad_row_wherever_it_stands(line: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{LINE}\n{line}\n{json.dumps(OTHER)}\n")
    assert read(path) == (["p", "q"], [f":2: {reason}"])
    path.write_text(f"{line}\n{LINE}\n{json.dumps(OTHER)}\n")
    assert read(path) == (["p", "q"], [f":1: {reason}"])


def test_a_row_of_an_array_that_is_only_odd_does_not_end_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    odd = ['{"prompt": "p", "n": ' + "9" * 5000 + "}", '{"a": 1, "a": 2}', '{"prompt": "\\ud800", "completion": "c"}']
    content = f"[{LINE}, {', '.join(odd)}, ".encode() + b'{"prompt": "\xff", "completion": "c"}, ' + f"{LINE}]".encode()
    path.write_bytes(content)
    good, bad = read(path)
    assert good == ["p", "p"]
    assert [line.split(": ")[1:] for line in bad] == [
        ["row 2", "a number in it has too many digits"],
        ["row 3", "the key 'a' occurs twice in an object"],
        ["row 4", '"prompt" is not valid UTF-8', "it holds half of a surrogate pair"],
        ["row 5", "not valid UTF-8 (invalid start byte at byte 12)"],
    ]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", LINE.encode("utf-16"), "is UTF-16: save it as UTF-8"),
        ("b.csv", "prompt,completion\na,b".encode("utf-16-le"), "is no text, or is UTF-16 or UTF-32"),
        ("c.json", gzip.compress(LINE.encode(), mtime=0), "is gzipped: add .gz to its name"),
        ("d.csv", b"PK\x03\x04...", "is a zip archive or a spreadsheet"),
        ("e.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
        ("f.csv", "prémpt,completion\na,b".encode("latin-1"), "its header is not valid UTF-8"),
        ("g.csv", b"prompt;completion\na;b\n", "its columns stand apart by ';'"),
        ("h.csv", b"prompt\tcompletion\na\tb\n", r"its columns stand apart by '\\t'"),
    ],
)
def test_files_of_another_kind_are_told(name: str, content: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}(:1:)? .*{told}|{name}.*{told}"):
        read(tmp_path / name)


def test_json_columns_of_datasets_are_values_not_text(tmp_path: Path) -> None:
    from datasets import Dataset, Features, Json, List, Value

    features = Features(
        {"messages": List(Json()), "all": Json(), "deep": {"one": List(Json())}, "text": Value("string")}
    )
    columns = {"messages": [TURNS], "all": [TURNS], "deep": [{"one": [TURNS[0], 3]}], "text": ["[1]"]}
    data = Dataset.from_dict(columns, features=features)
    wanted = {"messages": TURNS, "all": TURNS, "deep": {"one": [TURNS[0], 3]}, "text": "[1]"}
    data.save_to_disk(str(tmp_path / "saved"))
    data.to_parquet(str(tmp_path / "rows.parquet"))
    for path in (*(tmp_path / "saved").glob("*.arrow"), tmp_path / "rows.parquet"):
        assert rows_of(path) == [(f"{path}: row 1", wanted)]


def test_json_in_a_table_that_is_none_is_a_bad_row(tmp_path: Path) -> None:
    cells = pyarrow.ExtensionArray.from_storage(pyarrow.json_(), pyarrow.array(['{"a": 1}', "{", None]))
    pyarrow.parquet.write_table(pyarrow.table({"x": cells, "prompt": ["p"] * 3}), tmp_path / "rows.parquet")
    first, second, third = rows_of(tmp_path / "rows.parquet")
    assert first[1] == {"x": {"a": 1}, "prompt": "p"} and third[1] == {"x": None, "prompt": "p"}
    assert isinstance(second, Refused) and "not valid JSON" in second.reason


def test_columns_of_a_table_are_read_once_and_as_they_are(tmp_path: Path) -> None:
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["prompt", "prompt"])
    with pyarrow.ipc.new_file(tmp_path / "twice.arrow", twice.schema) as writer:
        writer.write_table(twice)
    pyarrow.parquet.write_table(twice, tmp_path / "twice.parquet")
    for name in ("twice.arrow", "twice.parquet"):
        with pytest.raises(DataError, match=rf"{name}: the column 'prompt' occurs twice"):
            rows_of(tmp_path / name)
    # What has several types is a union: of each message the other names are null.
    union = [{"role": None, "content": None, "from": "human", "value": "Hi"}]
    table = pyarrow.table(
        {
            "messages": [union],
            "large": pyarrow.array(["a"], pyarrow.large_string()),
            "view": pyarrow.array(["b"], pyarrow.string_view()),
            "coded": pyarrow.array(["c"]).dictionary_encode(),
            "bytes": [b"d"],
            "map": pyarrow.array([[("k", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int32())),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    ((_, row),) = rows_of(tmp_path / "rows.parquet")
    assert row == {"messages": union, "large": "a", "view": "b", "coded": "c", "bytes": b"d", "map": [("k", 1)]}
