"""Which files of a directory are read: saved sets, splits, links, hidden folders, and what is no regular file."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.errors import DataError
from rlhf.config.schema import DataConfig, OnProblem, SourceConfig
from rlhf.data.conversation import Conversation
from rlhf.data.problems import source_problems
from rlhf.data.sources import read_source, settled
from rlhf.data.sources.file import content_digest


def rows_file(path: Path, *prompts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": prompt, "completion": "c"}) + "\n" for prompt in prompts))
    return path


def prompts(path: Path, **options: Any) -> list[str]:
    source = SourceConfig(path=str(path), **options)
    found = read_source(source, name="main", on_bad_row=OnProblem.error)
    return [one.prompt_text for one in found if isinstance(one, Conversation)]


def notes(path: Path, **options: Any) -> list[str]:
    return settled(SourceConfig(path=str(path), **options), name="main")[1]


def test_hidden_files_and_folders_are_left_out_and_told(tmp_path: Path) -> None:
    rows_file(tmp_path / "a.jsonl", "a")
    for hidden in (".ipynb_checkpoints/a-checkpoint.jsonl", ".git/b.jsonl", "__MACOSX/c.jsonl", ".d.jsonl"):
        rows_file(tmp_path / hidden, "hidden")
    (tmp_path / "README.md").write_text("x")
    assert prompts(tmp_path) == ["a"]
    assert notes(tmp_path)[0] == "main: 1 file read, left out: 4 hidden, 1 of other kinds"
    assert prompts(tmp_path / ".git") == ["hidden"]  # What is asked for by name is read.


def test_a_saved_set_has_the_rows_that_its_state_lists(tmp_path: Path) -> None:
    from datasets import Dataset

    saved = str(tmp_path / "saved")
    Dataset.from_list([{"prompt": f"p{n}", "completion": "c"} for n in range(5)]).save_to_disk(saved)
    loaded = Dataset.load_from_disk(saved)
    loaded.map(lambda row: {"completion": row["prompt"]})
    loaded.shuffle(seed=1)
    assert len(list((tmp_path / "saved").glob("cache-*.arrow"))) == 2
    for path in (tmp_path / "saved", tmp_path):
        assert prompts(path) == [f"p{n}" for n in range(5)]
        assert notes(path)[0] == "main: 1 file read, left out: 2 beside the saved set"
    state = tmp_path / "saved" / "state.json"
    for content in ("{", "[]", '{"_data_files": [{"filename": "../x.arrow"}]}', '{"_data_files": [{"filename": 1}]}'):
        state.write_text(content)
        with pytest.raises(DataError, match=r"state\.json .*save the set again"):
            prompts(tmp_path)
    state.write_text('{"_data_files": [{"filename": "gone.arrow"}]}')
    with pytest.raises(DataError, match=r"gone\.arrow is a link to nothing|gone\.arrow"):
        prompts(tmp_path)


def test_of_a_saved_dict_the_split_is_read_that_is_asked_for(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    parts = {name: Dataset.from_list([{"prompt": name, "completion": "c"}] * 2) for name in ("train", "test")}
    DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    assert prompts(tmp_path / "saved") == ["train"] * 2
    assert notes(tmp_path / "saved")[0] == "main: 1 file read, left out: 1 of split test"
    assert prompts(tmp_path / "saved", split="test") == ["test"] * 2
    assert prompts(tmp_path / "saved" / "test") == ["test"] * 2
    said = "a saved DatasetDict with the splits train, test, without dev: name one of them in data.sources.main.split"
    with pytest.raises(DataError, match=said):
        prompts(tmp_path / "saved", split="dev")
    parts = {f"{name}_sft": part for name, part in parts.items()}
    DatasetDict(parts).save_to_disk(str(tmp_path / "several"))
    said = "the splits train_sft, test_sft, without train: set data.sources.main.split=train_sft"
    with pytest.raises(DataError, match=said):
        prompts(tmp_path / "several")
    assert prompts(tmp_path / "several", split="train_sft") == prompts(tmp_path / "saved")
    digests = {content_digest(SourceConfig(path=str(tmp_path / "saved"), split=s), name="x") for s in ("train", "test")}
    assert len(digests) == 2


def test_names_tell_train_from_test(tmp_path: Path) -> None:
    rows_file(tmp_path / "a" / "data" / "train-00000-of-00001.jsonl", "train")
    rows_file(tmp_path / "a" / "data" / "validation-00000-of-00001.jsonl", "dev")
    rows_file(tmp_path / "a" / "extra.jsonl", "extra")
    rows_file(tmp_path / "a" / "test" / "rows.jsonl", "test")
    assert prompts(tmp_path / "a") == ["train", "extra"]
    assert notes(tmp_path / "a")[0] == "main: 2 files read, left out: 1 of split validation, 1 of split test"
    assert prompts(tmp_path / "a", split="test") == ["test"]
    assert prompts(tmp_path / "a", split="dev") == ["dev"]
    rows_file(tmp_path / "b" / "test.jsonl", "only")
    rows_file(tmp_path / "b" / "latest.jsonl", "latest")
    assert prompts(tmp_path / "b") == ["latest", "only"]  # There is nothing that is called training data.
    with pytest.raises(DataError, match=r"has no such file \(but 1 of split train, 1 of split test\)"):
        prompts(tmp_path / "b", split="validation")


def test_links_are_followed_once(tmp_path: Path) -> None:
    rows_file(tmp_path / "set" / "a.jsonl", "a")
    rows_file(tmp_path / "elsewhere" / "b.jsonl", "b")
    (tmp_path / "set" / "again.jsonl").symlink_to("a.jsonl")
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "linked2").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "up").symlink_to(tmp_path / "set")
    assert prompts(tmp_path / "set") == ["a", "b"]
    (tmp_path / "set" / "gone.jsonl").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"gone\.jsonl is a link to nothing"):
        prompts(tmp_path / "set")
    (tmp_path / "self.jsonl").symlink_to("self.jsonl")
    problems = list(source_problems(DataConfig(sources={"main": SourceConfig(path=str(tmp_path / "self.jsonl"))})))
    assert len(problems) == 1 and "cannot be read: Too many levels of symbolic links" in problems[0]


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.csv").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket.json"))
        for name, kind in (("pipe.jsonl", "a named pipe"), ("zero.csv", "a device"), ("socket.json", "a socket")):
            source = SourceConfig(path=str(tmp_path / name))
            (problem,) = source_problems(DataConfig(sources={"main": source}))
            assert problem.startswith(f"data.sources.main.path={tmp_path / name}: is {kind}, not a regular file")
            for read in (lambda one: settled(one, name="main"), lambda one: content_digest(one, name="main")):
                with pytest.raises(DataError, match=rf"is {kind}"):
                    read(source)
            (tmp_path / name).rename(tmp_path / f"kept-{name}.bak")
            folder = tmp_path / f"folder-{name}"
            folder.mkdir()
            (tmp_path / f"kept-{name}.bak").rename(folder / name)
            with pytest.raises(DataError, match=rf"{name} is {kind}, not a regular file"):
                prompts(folder)


@pytest.mark.parametrize(
    ("path", "reason"),
    [("/tmp/a\0b.jsonl", "embedded null byte"), (f"/tmp/{'x' * 300}.jsonl", "File name too long")],
)
def test_paths_that_cannot_be_are_told(path: str, reason: str) -> None:
    source = SourceConfig(path=path)
    (problem,) = source_problems(DataConfig(sources={"main": source}))
    assert f"cannot be read: {reason}" in problem and "\0" not in problem
    with pytest.raises(DataError, match=f"cannot be read: {reason}"):
        prompts(Path(path))


def test_names_of_files_are_shown_on_one_line(tmp_path: Path) -> None:
    for name, told in ((b"a\nb.jsonl", r"a\nb.jsonl"), (b"\xff.jsonl", r"\xff.jsonl"), (b"\x1b[2J.jsonl", r"\x1b[2J")):
        path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
        path.write_text("x\n")
        with pytest.raises(DataError) as raised:
            prompts(path)
        assert told in str(raised.value) and str(raised.value).isascii()
        rows_file(path, "p")
        assert prompts(path) == ["p"]
        assert content_digest(SourceConfig(path=str(path)), name="main")
        path.unlink()


@pytest.mark.parametrize("name", ["x" * 300, "a/b", "..", ".hidden", "a b", "\x1b[0m"])
def test_a_mix_is_called_as_a_directory_can_be(name: str) -> None:
    data = DataConfig(name=name, sources={"main": SourceConfig(kind="film_reviews")})
    (problem,) = source_problems(data)
    assert problem.startswith("data.name=") and len(problem) < 250 and problem.isprintable()


def test_usual_names_of_mixes_are_right() -> None:
    for name in ("", "files", "my-mix_2.1", "日本語"):
        assert not list(source_problems(DataConfig(name=name, sources={"main": SourceConfig(kind="film_reviews")})))
