"""Files and directories that appear whole, with the modes of the umask."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf.config.writing import whole_directory, whole_file, write_json, write_text


@pytest.fixture(params=[0o022, 0o027, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_files_have_the_mode_of_the_umask_however_they_are_written(tmp_path: Path, umask: int) -> None:
    write_text(tmp_path / "new" / "a.txt", "a")
    with whole_file(tmp_path / "b") as temporary:
        temporary.unlink()
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT, 0o600))  # As safetensors does.
    with whole_directory(tmp_path / "model") as partial:
        (partial / "inner").mkdir(mode=0o700)
        os.close(os.open(partial / "inner" / "weights", os.O_WRONLY | os.O_CREAT, 0o600))
    files = [tmp_path / "new" / "a.txt", tmp_path / "b", tmp_path / "model" / "inner" / "weights"]
    assert {mode(path) for path in files} == {0o666 & ~umask}
    assert {mode(path) for path in (tmp_path / "model", tmp_path / "model" / "inner")} == {0o777 & ~umask}


def test_what_fails_leaves_what_was_there(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")
    with whole_directory(tmp_path / "model") as partial:
        (partial / "weights").write_text("old")
    with pytest.raises(OSError, match="disk"), whole_file(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise OSError("disk")
    with pytest.raises(KeyboardInterrupt), whole_directory(tmp_path / "model") as partial:
        (partial / "weights").write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "file", {"loss": float("nan")})
    assert (tmp_path / "file").read_text() == (tmp_path / "model" / "weights").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "model"]


def test_a_directory_is_replaced_as_a_whole_and_so_is_a_file_or_a_link(tmp_path: Path) -> None:
    with whole_directory(tmp_path / "model") as partial:
        (partial / "old").touch()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    (tmp_path / "file").touch()
    for name in ("model", "link", "file"):
        with whole_directory(tmp_path / name) as partial:
            (partial / "new").touch()
        assert [path.name for path in (tmp_path / name).iterdir()] == ["new"]
        assert not (tmp_path / name).is_symlink()


def test_another_name_of_a_file_elsewhere_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "private").touch(mode=0o600)
    with whole_directory(tmp_path / "kept") as partial:
        os.link(tmp_path / "private", partial / "private")
        (partial / "gone").symlink_to(tmp_path / "nowhere")
    assert mode(tmp_path / "private") == 0o600


def test_names_of_any_length_and_kind(tmp_path: Path) -> None:
    for name in ("x" * 255, "é" * 127, "[a]*?", "a b"):
        write_json(tmp_path / name, {"name": name})
        assert json.loads((tmp_path / name).read_text()) == {"name": name}
        with whole_directory(tmp_path / "directories" / name) as partial:
            (partial / "file").touch()
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.processes
def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom rlhf.config.writing import whole_directory\n"
        "with whole_directory(Path(sys.argv[1])) as partial:\n"
        "    (partial / 'weights').write_bytes(b'x')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "model")], check=False, timeout=60)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".model.") and (left / "weights").is_file()
    with whole_directory(tmp_path / "model") as first:
        assert not left.exists()
        with whole_directory(tmp_path / "model") as second:
            assert first.is_dir()
            (second / "weights").touch()
        (first / "weights").write_text("last")
    assert (tmp_path / "model" / "weights").read_text() == "last"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_reader_finds_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"run": 0})
    with path.open() as reader:
        write_json(path, {"run": 1})
        assert json.load(reader) == {"run": 0}
    assert json.loads(path.read_text()) == {"run": 1}
