"""Rows and cells beyond the limit, and small files that would grow without end: told, with bounded memory and time."""

import gzip
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from rlhf.config.errors import DataError
from rlhf.config.schema import OnProblem, SourceConfig
from rlhf.data.conversation import Conversation, Refused
from rlhf.data.sources import read_source

LIMIT = 1000
TOLD = f"longer than {LIMIT} bytes (data.sources.*.max_row_bytes)"
SMALL = {"prompt": "p", "completion": "c"}
LARGE = {"prompt": "p" * 2000, "completion": "c"}


def read(path: Path, **options: Any) -> tuple[list[str], list[str]]:
    source = SourceConfig(path=str(path), format="completion", **{"max_row_bytes": LIMIT, **options})
    found = list(read_source(source, name="main", on_bad_row=OnProblem.skip))
    bad = [f"{one.where}: {one.reason}" for one in found if isinstance(one, Refused)]
    return [one.prompt_text for one in found if isinstance(one, Conversation)], bad


def write_arrow(path: Path, table: pyarrow.Table, **options: Any) -> Path:
    with pyarrow.ipc.new_stream(path, table.schema, options=pyarrow.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return path


def test_a_row_beyond_the_limit_is_a_bad_row_in_every_kind_of_file(tmp_path: Path) -> None:
    rows = [SMALL, LARGE, SMALL]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    table = pyarrow.Table.from_pylist(rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.json").write_text(json.dumps(rows))
    (tmp_path / "d.csv").write_text("prompt,completion\np,c\n" + "p" * 2000 + ",c\np,c\n")
    pyarrow.parquet.write_table(table, tmp_path / "e.parquet")
    write_arrow(tmp_path / "f.arrow", table)
    encoded = table.set_column(0, "prompt", table["prompt"].dictionary_encode())
    write_arrow(tmp_path / "g.arrow", encoded)
    for path in sorted(tmp_path.iterdir()):
        good, bad = read(path)
        assert good == ["p", "p"], path
        assert len(bad) == 1 and bad[0].endswith(TOLD), path
        assert read(path, max_row_bytes=3000)[0] == ["p", LARGE["prompt"], "p"], path


def test_the_limit_counts_bytes(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"prompt": "é" * 600, "completion": "c"}], ensure_ascii=False))
    assert len(path.read_text()) < LIMIT
    with pytest.raises(DataError, match="longer than 1000 bytes"):
        read(path)


def test_what_cannot_be_skipped_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.data.json_rows._PIECE", 100)
    for name, content in (
        ("a.json", json.dumps([SMALL, LARGE])),
        ("b.json", json.dumps({"data": [SMALL, LARGE]}, indent=1)),
        ("c.csv", 'prompt,completion\np,c\n"' + "p\n" * 1000 + '",c\n'),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=rf"{name}.*(row 2|:3).*longer than 1000 bytes"):
            read(tmp_path / name)


def test_a_large_list_inside_an_object_is_read_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.data.json_rows._PIECE", 100)
    for indent in (None, 1):
        (tmp_path / "rows.json").write_text(json.dumps({"version": [1], "data": [SMALL] * 100, "n": 1}, indent=indent))
        assert read(tmp_path / "rows.json") == (["p"] * 100, [])
    (tmp_path / "rows.json").write_text(json.dumps({"train": [SMALL] * 100, "rows": [SMALL] * 100}))
    with pytest.raises(DataError, match=r"holds several lists of rows \(train, rows\)"):
        read(tmp_path / "rows.json")
    (tmp_path / "rows.json").write_text(json.dumps({"what": [SMALL] * 100}, indent=1))
    with pytest.raises(DataError, match="its first row is longer than 1000 bytes"):
        read(tmp_path / "rows.json")


def bomb(head: bytes, fill: bytes, times: int) -> bytes:
    """A gzipped text that goes on and on: `fill` a thousand times, `times` times."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return packer.compress(head) + b"".join(packer.compress(fill * 1000) for _ in range(times)) + packer.flush()


@pytest.mark.parametrize(
    ("name", "head", "fill"),
    [
        ("zeros.jsonl.gz", b'{"prompt": "', b"0"),
        ("lines.jsonl.gz", b"", b"\n"),
        ("spaces.json.gz", b"[", b" "),
        ("text.csv.gz", b"prompt,completion\n", b"x"),
        ("quoted.csv.gz", b'prompt,completion\n"', b"x\n"),
    ],
)
def test_a_small_file_that_grows_is_given_up(
    name: str, head: bytes, fill: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf.data.text_files._FREE", 100_000)
    (tmp_path / name).write_bytes(bomb(head, fill, 20_000))
    with pytest.raises(DataError, match=r"grows more than 250-fold when unpacked|the row is longer than 1000 bytes"):
        read(tmp_path / name)


def test_a_page_that_is_too_large_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.parquet"
    rows = [SMALL] * 3 + [{"prompt": "p" * 200_000, "completion": "c"}] + [SMALL] * 2
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    monkeypatch.setattr("rlhf.data.tables._LARGEST_PAGE", 100_000)
    good, bad = read(path)
    assert good == ["p"] * 4
    assert [line.split(": ", 2)[1] for line in bad] == ["row 3", "row 4"]  # One of them is good, but stands beside it.
    assert all("stands beside a cell of up to 2000" in line and line.endswith(TOLD) for line in bad)


def test_values_that_repeat_do_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 20_000, pyarrow.int32()), ["x" * 900])
    table = pyarrow.table({"prompt": text, "completion": pyarrow.array(["c"] * 20_000)})
    monkeypatch.setattr("rlhf.data.tables._FREE", 1_000_000)
    monkeypatch.setattr("rlhf.data.tables._EXPANSION", 100)
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    write_arrow(tmp_path / "rows.arrow", table, compression="zstd")
    for name in ("rows.parquet", "rows.arrow"):
        with pytest.raises(DataError, match=rf"{name}: its rows have more than \d+ bytes"):
            read(tmp_path / name)


def test_batches_that_grow_are_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.data.tables._LARGEST_PAGE", 100_000)
    table = pyarrow.table({"prompt": ["x" * 500_000], "completion": ["c"]})
    for kind in ("lz4", "zstd"):
        path = write_arrow(tmp_path / f"{kind}.arrow", table, compression=kind)
        with pytest.raises(DataError, match=rf"{kind}\.arrow: a batch of \d+ bytes grows to 500017 when unpacked"):
            read(path)
    path = write_arrow(tmp_path / "rows.arrow", pyarrow.Table.from_pylist([SMALL] * 500), compression="zstd")
    assert read(path)[0] == ["p"] * 500


def test_more_rows_than_bytes_are_not_counted_through(tmp_path: Path) -> None:
    batch = pyarrow.RecordBatch.from_arrays([pyarrow.nulls(10**9)], names=["prompt"])
    write_arrow(tmp_path / "rows.arrow", pyarrow.Table.from_batches([batch]))
    with pytest.raises(DataError, match=r"rows\.arrow: says that it has 1000000000 rows in \d+ bytes"):
        read(tmp_path / "rows.arrow")


def test_a_footer_with_fewer_columns_than_the_schema_does_not_end_the_process(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([SMALL] * 3), path)
    content = path.read_bytes()
    (length,) = struct.unpack("<i", content[-8:-4])
    refused = 0
    for place in range(len(content) - 8 - length, len(content) - 8):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        try:
            read(path)
        except DataError as error:
            refused += 1
            assert str(path) in str(error) or "has no usable row" in str(error)
    assert refused > 50


def test_a_footer_of_nested_lists_is_no_parquet(tmp_path: Path) -> None:
    path, footer = tmp_path / "rows.parquet", b"\x49" + b"\x19" * 5000  # A field that is a list of lists of lists …
    path.write_bytes(b"PAR1" + footer + struct.pack("<i", len(footer)) + b"PAR1")
    with pytest.raises(DataError, match=r"rows\.parquet: not valid Parquet \(its footer cannot be read\)"):
        read(path)
