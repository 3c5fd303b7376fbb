"""Thousands of damaged files in every format: never a traceback, never a wrong count."""

import gzip
import json
import random
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from rlhf.config.errors import DataError
from rlhf.config.schema import OnProblem, SourceConfig
from rlhf.data.conversation import Conversation, Refused
from rlhf.data.sources import read_source, settled

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
LONGER = [{"role": "system", "content": "s"}, *TURNS, {"role": "user", "content": "and?"}]
SAID, UNSAID = [*LONGER, {"role": "assistant", "content": "a"}], [*LONGER, {"role": "assistant", "content": "b"}]
SPOKEN = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: "
# Rows with one turn and with several, all of them right.
GOOD: dict[str, list[dict[str, Any]]] = {
    "preference": [
        {"prompt": "p", "chosen": "c", "rejected": "r"},
        {"prompt": LONGER, "chosen": SAID[-1:], "rejected": UNSAID[-1:]},
        {"chosen": SAID, "rejected": UNSAID},
    ],
    "conversational": [{"messages": TURNS}, {"messages": SAID}],
    "completion": [{"prompt": "p", "completion": "c"}, {"prompt": LONGER, "completion": SAID[-1:]}],
    "instruction": [
        {"instruction": "i", "input": "", "output": "o"},
        {"instruction": "i", "input": "x", "output": "o"},
    ],
    "transcript": [
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
        {"chosen": f"{SPOKEN}d", "rejected": f"{SPOKEN}e"},
        {"prompt": SPOKEN, "chosen": " d", "rejected": " e"},
    ],
    "scored_pair": [
        {"prompt": "p", "answer_0": "a", "answer_1": "b", "score_0": 0.5, "score_1": 1},
        {"prompt": LONGER, "answer_0": "a", "answer_1": "b", "score_0": 2, "score_1": 1},
    ],
    "prompt": [{"prompt": "p"}, {"prompt": LONGER}],
    "text": [{"text": "t"}, {"text": "t\r\nt"}],
}
ODD: list[Any] = [None, "", "  ", 0, -1.5, True, [], {}, [[]], [None], {"role": "user"}, TURNS, "\ud800", "x" * 10_000]
ODD += [float("nan"), 10**400, [{"role": "user", "content": 3}], "\x00", "\n\nHuman:", "\u202e", [TURNS]]
FILES = 1_000  # Of each format.


def mutated(row: dict[str, Any], luck: random.Random) -> Any:
    """A row with something changed, or something else altogether."""
    row = dict(row)
    for _ in range(luck.randint(1, 2)):
        choice = luck.random()
        if choice < 0.15:
            return luck.choice(ODD)
        key = luck.choice(list(row)) if row else "x"
        if choice < 0.4:
            row.pop(key, None)
        elif choice < 0.5:
            row[key + "x"] = row.pop(key, None)
        elif choice < 0.7 and isinstance(row.get(key), list) and row[key]:
            row[key] = mutated_turns(row[key], luck)
        else:
            row[key] = luck.choice(ODD)
    return row


def mutated_turns(turns: list[Any], luck: random.Random) -> list[Any]:
    """A conversation with something changed: a turn is missing, double, elsewhere, or has other keys."""
    turns = list(turns)
    place = luck.randrange(len(turns))
    choice = luck.random()
    if choice < 0.2:
        del turns[place]
    elif choice < 0.4:
        turns.insert(place, luck.choice(turns))
    elif choice < 0.6:
        luck.shuffle(turns)
    elif isinstance(turns[place], dict) and turns[place]:
        key = luck.choice(list(turns[place]))
        turns[place] = {**turns[place], key: luck.choice(ODD)}
    return turns


def write_table(table: pyarrow.Table, path: Path) -> None:
    """As Parquet, or as an Arrow stream."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
        return
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def write(path: Path, rows: list[Any], luck: random.Random) -> bool:
    """Write rows in the file's own way, perhaps with damaged bytes; whether the rows can still be counted."""
    if path.name.endswith((".parquet", ".arrow")):
        usable = [row for row in rows if isinstance(row, dict) and row]
        try:
            keys = dict.fromkeys(key for row in usable for key in row)
            table = pyarrow.Table.from_pylist([{key: row.get(key) for key in keys} for row in usable])
            write_table(table, path)
        except (pyarrow.ArrowException, OverflowError, TypeError, ValueError):
            # A table that cannot be: columns of several types.
            usable = [{"prompt": "p"}] * len(usable)
            write_table(pyarrow.Table.from_pylist(usable), path)
        rows[:] = usable
        content = path.read_bytes()
    elif path.name.endswith(".csv"):
        # Only texts without a quote or a line break: what a spreadsheet would write of others is another test's.
        rows[:] = [{key: str(value) for key, value in row.items()} for row in rows if isinstance(row, dict) and row]
        rows[:] = [
            row
            for row in rows
            if list(row) == list(rows[0])
            and any(row.values())
            and not re.search('["\\r\\n,\\ud800\\0]', "".join([*row, *row.values()]))
        ]
        lines = [",".join(row) for row in rows[:1]] + [",".join(row.values()) for row in rows]
        content = "".join(f"{line}\n" for line in lines).encode()
    elif path.name.endswith((".json", ".json.gz")):
        content = json.dumps(rows, indent=luck.choice([None, None, 1])).encode()
    else:
        ending = luck.choice(["\n", "\n", "\r\n", "\n\n"])
        content = "".join(json.dumps(row) + ending for row in rows).encode()
    damaged = luck.random() < 0.3
    if damaged:
        for _ in range(luck.randint(1, 4)):
            place = luck.randrange(len(content)) if content else 0
            choice = luck.random()
            if choice < 0.5:
                content = content[:place] + bytes([luck.randrange(256)]) + content[place + 1 :]
            elif choice < 0.8:
                content = content[:place] + content[place + luck.randint(1, 30) :]
            else:
                content = content[:place]
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    if path.suffix == ".gz" and luck.random() < 0.2:
        packed = path.read_bytes()
        path.write_bytes(packed[: luck.randrange(1, len(packed))])
        return False
    return not damaged


@pytest.mark.exhaustive
@pytest.mark.parametrize("form", sorted(GOOD))
def test_damaged_files_are_refused_by_row_or_as_a_whole(form: str, tmp_path: Path) -> None:
    luck = random.Random(form)
    outcomes = {"read": 0, "refused": 0}
    for number in range(FILES):
        suffix = luck.choice([".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".parquet", ".arrow"])
        path = tmp_path / f"{number}{suffix}"
        goods = [luck.choice(GOOD[form]) for _ in range(luck.randint(1, 8))]
        rows = [mutated(row, luck) if luck.random() < 0.5 else row for row in goods]
        countable = write(path, rows, luck)
        source = SourceConfig(path=str(path), format=form if luck.random() < 0.7 else "auto")
        found: list[Conversation | Refused] = []
        try:
            chosen = settled(source, name="main")[0].format
            found.extend(read_source(source, name="main", on_bad_row=OnProblem.skip))
        except DataError as error:
            outcomes["refused"] += 1
            assert str(path) in str(error) or str(error).startswith("data.sources.main: ")
            assert len(str(error)) < 5000
            continue
        outcomes["read"] += 1
        assert all(entry.where.startswith(str(path)) for entry in found)
        assert all(entry.reason for entry in found if isinstance(entry, Refused))
        if countable:
            assert len(found) == len(rows), path
            good = sum(any(row is right for right in GOOD[form]) for row in rows)
            usable = sum(isinstance(entry, Conversation) for entry in found)
            assert chosen != form or usable >= good, path
        bad = sum(isinstance(entry, Refused) and entry.bad for entry in found)
        if bad:
            with pytest.raises(DataError, match=f"{bad} rows? cannot be used"):
                list(read_source(source, name="main", on_bad_row=OnProblem.error))
    assert outcomes["read"] > 50 and outcomes["refused"] > 5
