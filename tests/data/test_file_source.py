"""Local files of rows, and what is said about broken ones."""

import csv
import gzip
import io
import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from rlhf.config.errors import ConfigError, DataError
from rlhf.config.schema import OnProblem, SourceConfig
from rlhf.data.conversation import Conversation, Message, Refused
from rlhf.data.sources import read_source

ROW = {"prompt": "p", "chosen": "c", "rejected": "r"}


def read(
    path: Path | None, *, on_bad_row: OnProblem = OnProblem.error, form: str = "auto", limit: int = 2**23
) -> tuple[list[Conversation], list[str]]:
    source = SourceConfig(kind="file", path=None if path is None else str(path), format=form, max_row_bytes=limit)
    found = list(read_source(source, name="main", on_bad_row=on_bad_row))
    bad = [f"{entry.where}: {entry.reason}" for entry in found if isinstance(entry, Refused)]
    return [entry for entry in found if isinstance(entry, Conversation)], bad


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_all_formats_give_the_same_rows(tmp_path: Path) -> None:
    rows = [{**ROW, "prompt": f"p{n}"} for n in range(3)]
    lines = write(tmp_path / "a.jsonl", *rows)
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    array = tmp_path / "a.json"
    array.write_text(json.dumps(rows))
    for path in (lines, packed, array):
        found, bad = read(path)
        assert [row.messages for row in found] == [(Message("user", f"p{n}"),) for n in range(3)]
        assert [(row.chosen, row.rejected, row.source) for row in found] == [("c", "r", "main")] * 3
        assert bad == []


def test_tables_give_the_same_rows(tmp_path: Path) -> None:
    rows = [{**ROW, "prompt": f"p{n}, \u00fc"} for n in range(3)]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(ROW))
    writer.writeheader()
    writer.writerows(rows)
    (tmp_path / "a.csv").write_text(text.getvalue(), encoding="utf-8")
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(text.getvalue().encode("utf-8-sig")))
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    for name, opened in (("d.arrow", pyarrow.ipc.new_stream), ("e.arrow", pyarrow.ipc.new_file)):
        with opened(tmp_path / name, table.schema) as arrow:
            arrow.write_table(table)
    for path in sorted(tmp_path.iterdir()):
        found, bad = read(path)
        assert [(row.prompt_text, row.chosen, row.rejected) for row in found] == [(r["prompt"], "c", "r") for r in rows]
        assert bad == []
    assert len(read(tmp_path)[0]) == 15


def test_rows_of_a_table_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'prompt,chosen,rejected\na,b,c\na,b\n\n\xff,b,c\n"x\ny",b,c\n,b,c\n')
    found, bad = read(path, on_bad_row=OnProblem.skip)
    assert [row.prompt_text for row in found] == ["a", "x\ny"]
    assert bad == [
        f"{path}:3: has 2 cells, but the header has 3",
        f'{path}:5: "prompt" is not valid UTF-8: it holds half of a surrogate pair',
        f'{path}:8: "prompt" is empty',
    ]
    (tmp_path / "b.csv").write_text("prompt,prompt\na,b\n")
    with pytest.raises(DataError, match="the column 'prompt' occurs twice"):
        read(tmp_path / "b.csv")
    for name in ("c.parquet", "d.arrow"):
        (tmp_path / name).write_bytes(b"PAR1 is not what it is")
        with pytest.raises(DataError, match=rf"{name}: not valid"):
            read(tmp_path / name)


def test_a_huge_line_is_a_broken_row_and_the_next_one_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROW, {**ROW, "prompt": "x" * 5000}, "[" * 1000, {**ROW, "prompt": "last"})
    found, bad = read(path, on_bad_row=OnProblem.skip, limit=1024)
    assert [row.prompt_text for row in found] == ["p", "last"]
    assert len(bad) == 2 and bad[0].startswith(f"{path}:2: longer than") and bad[1].startswith(f"{path}:3: ")


def test_deeply_nested_json_is_a_broken_row(tmp_path: Path) -> None:
    found, bad = read(write(tmp_path / "rows.jsonl", "[" * 200_000, ROW), on_bad_row=OnProblem.skip)
    assert len(found) == len(bad) == 1


def test_files_of_one_directory_may_differ_in_their_columns_but_each_is_checked(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ROW)
    write(tmp_path / "b.jsonl", {"question": "p", "chosen": "c", "rejected": "r"})
    found, bad = read(tmp_path, on_bad_row=OnProblem.skip, form="preference")
    assert len(found) == 1
    assert bad == [f'{tmp_path}/b.jsonl:1: the column "prompt" is missing (there are: question, chosen, rejected)']


def test_a_directory_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", {**ROW, "prompt": "second"})
    write(tmp_path / "a.jsonl", {**ROW, "prompt": "first"})
    write(tmp_path / "notes.txt", "no rows")
    assert [row.prompt_text for row in read(tmp_path)[0]] == ["first", "second"]


def test_prompts_alone_have_no_answers(tmp_path: Path) -> None:
    found, _ = read(write(tmp_path / "a.jsonl", {"prompt": "p"}), form="prompt")
    assert (found[0].chosen, found[0].rejected) == (None, None)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{not json", "not valid JSON"),
        ([1, 2], "must be an object with the columns prompt, chosen, rejected, not list"),
        ({"prompt": "p", "chosen": "c"}, 'the column "rejected" is missing (there are: prompt, chosen)'),
        ({**ROW, "chosen": 3}, '"chosen" must be text, not int'),
        ({**ROW, "prompt": "  "}, '"prompt" is empty'),
        ({**ROW, "chosen": None}, '"chosen" is null'),
        ({**ROW, "chosen": ""}, '"chosen" is empty'),
        ({**ROW, "chosen": ROW["rejected"]}, "chosen and rejected are equal"),
    ],
)
def test_a_broken_row_is_named_by_file_and_line(tmp_path: Path, line: object, reason: str) -> None:
    path = write(tmp_path / "rows.jsonl", ROW, "", line, ROW)
    with pytest.raises(DataError) as raised:
        read(path)
    assert f"{path}:3: {reason}" in str(raised.value)
    assert "data.on_bad_row=skip" in str(raised.value)
    found, bad = read(path, on_bad_row=OnProblem.skip)
    assert len(found) == 2
    assert len(bad) == 1 and bad[0].startswith(f"{path}:3: {reason}")


def test_bytes_that_are_no_text_are_a_broken_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b'\n{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:2: not valid UTF-8"):
        read(path)


def test_half_a_surrogate_pair_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + '{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}\n')
    with pytest.raises(
        DataError, match=r'rows\.jsonl:2: "prompt" is not valid UTF-8: it holds half of a surrogate pair'
    ):
        read(path)


def test_only_the_first_twenty_faults_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with pytest.raises(DataError) as raised:
        read(write(path, *({"prompt": "p", "chosen": "c", f"n{n}": 1} for n in range(25)), ROW), form="preference")
    message = str(raised.value)
    assert "25 rows cannot be used" in message and "rows.jsonl:20:" in message and "… and 5 more" in message
    assert "rows.jsonl:21:" not in message


def test_a_fault_that_rows_share_is_told_once(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", *([{"prompt": "p", "chosen": "c"}] * 2000), {"prompt": "p"}, "x", "x")
    with pytest.raises(DataError) as raised:
        read(path, form="preference")
    assert str(raised.value).split("\n") == [
        "data.sources.main: all 2003 rows cannot be used:",
        f'  {path}:1: the column "rejected" is missing (there are: prompt, chosen) (and 1999 more rows: 2, 3, 4, …)',
        f'  {path}:2001: the column "chosen" is missing (there are: prompt)',
        f"  {path}:2002: not valid JSON (Expecting value at character 1) (and 1 more row: 2003)",
        "Repair them, or set data.on_bad_row=skip to leave them out",
    ]


@pytest.mark.parametrize("lines", [(), ("", "  ")])
def test_an_empty_file_is_an_error(tmp_path: Path, lines: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match=r"data\.sources\.main .*rows\.jsonl\) has no usable row"):
        read(write(tmp_path / "rows.jsonl", *lines))


def test_only_broken_rows_are_an_error_even_when_skipping(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no usable row"):
        read(write(tmp_path / "rows.jsonl", "x"), on_bad_row=OnProblem.skip)


def test_wrong_paths_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.sources\.main\.path is not set"):
        read(None)
    with pytest.raises(DataError, match=r"data\.sources\.main\.path=.*none\.jsonl does not exist"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"has no such file"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"the name must be that of a file ending in \.jsonl"):
        read(write(tmp_path / "rows.txt", "a"))
    with pytest.raises(DataError, match=r"must hold a JSON array of rows, or one object in each line"):
        read(write(tmp_path / "rows.json", "text"))
    whole = gzip.compress(json.dumps(ROW).encode() * 50)
    damaged = whole[:15] + bytes(byte ^ 0xFF for byte in whole[15:25]) + whole[25:]
    for content in (b"not gzip", whole[:-12], damaged):
        (tmp_path / "rows.jsonl.gz").write_bytes(content)
        with pytest.raises(DataError, match=r"rows\.jsonl\.gz cannot be read"):
            read(tmp_path / "rows.jsonl.gz")


def test_an_unknown_kind_names_those_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"data\.sources\.x\.kind=films: .* there are file, film_reviews"):
        list(read_source(SourceConfig(kind="films"), name="x", on_bad_row=OnProblem.error))


def test_a_quote_that_is_never_closed_swallows_no_rows(tmp_path: Path) -> None:
    rows = "".join(f"p {n},c,r\n" for n in range(100))
    path = tmp_path / "rows.csv"
    for broken in ('a,b,"c\n', 'a,"b,c\n'):
        path.write_text(f"prompt,chosen,rejected\np,c,r\n{broken}{rows}")
        with pytest.raises(DataError, match=r"rows\.csv:3: a quote in this row is never closed"):
            read(path, on_bad_row=OnProblem.skip)
    path.write_text(f'prompt,chosen,rejected\na,"b"c,d\n"a ""quoted""\nline",c,r\n{rows}')
    found, bad = read(path, on_bad_row=OnProblem.skip)
    assert len(found) == 101 and len(bad) == 1 and "rows.csv:2: not valid CSV" in bad[0]


def test_json_arrays_are_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.data.json_rows._PIECE", 7)
    rows = [{**ROW, "prompt": f"p {n} é"} for n in range(30)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    found, bad = read(path)
    assert [row.prompt_text for row in found] == [row["prompt"] for row in rows] and bad == []
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))  # As some sets of the hub call their lines.
    assert len(read(path)[0]) == 30
    for content, reason in (
        ("[1, 2", "row 2: there is no , or ] behind it"),
        ('[{"a": 1} {"b": 2}]', "row 1: '{' stands behind it instead of , or ]"),
        ("[1] 2", "more behind the array"),
        ('[{"a": }]', "row 1: Expecting value"),
        ("[1, ]", "row 2: Expecting value"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=rf"rows\.json: not valid JSON .*{re.escape(reason)}"):
            read(path, on_bad_row=OnProblem.skip)


def test_a_saved_set_and_capitals_are_read(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_list([ROW] * 3).save_to_disk(str(tmp_path / "saved"))
    assert len(read(tmp_path / "saved")[0]) == 3
    assert len(read(write(tmp_path / "ROWS.JSONL", ROW))[0]) == 1
    (tmp_path / "_part.jsonl").write_text(json.dumps(ROW))
    assert len(read(tmp_path / "_part.jsonl")[0]) == 1


def test_an_arrow_file_with_wrong_offsets_is_refused(tmp_path: Path) -> None:
    import pyarrow

    table = pyarrow.Table.from_pylist([ROW] * 4)
    path = tmp_path / "rows.arrow"
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    content = bytearray(path.read_bytes())
    offsets = content.find((1).to_bytes(4, "little") + (2).to_bytes(4, "little"))
    content[offsets : offsets + 4] = (2**30).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"rows\.arrow: not valid Arrow"):
        read(path, on_bad_row=OnProblem.skip)
