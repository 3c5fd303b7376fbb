"""Data sets of the hub: loaded from a real server, then from the cache; what is said if neither has them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

SCRIPT = """
import sys
from rlhf.config.errors import DataError
from rlhf.config.schema import OnProblem, SourceConfig
from rlhf.data.sources import read_source
from rlhf.data.sources.hub import content_digest
source = SourceConfig(kind="hub", path=sys.argv[1], split=sys.argv[2])
try:
    for row in read_source(source, name="main", on_bad_row=OnProblem.error):
        print(row.where, row.prompt_text)
    print(content_digest(source, name="main"))
except DataError as error:
    print(error)
"""
HERE = Path(__file__).parent


@pytest.fixture
def hub() -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    server = subprocess.Popen([sys.executable, str(HERE / "hub_server.py")], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    yield f"http://127.0.0.1:{server.stdout.readline().strip()}", server
    server.kill()
    server.wait()


def load(home: Path, url: str, path: str, *, split: str = "train", offline: bool = False) -> str:
    environment = os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline))}
    command = [sys.executable, "-c", SCRIPT, path, split]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False, cwd=HERE.parents[1]
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_set_is_loaded_once_and_found_without_a_network(
    hub: tuple[str, "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    url, server = hub
    first = load(tmp_path, url, "org/pairs")
    assert first.splitlines()[:3] == [f"org/pairs [train] row {n + 1} p{n}" for n in range(3)]
    nowhere = load(tmp_path, url, "org/pairs", split="tran")
    assert nowhere.startswith("data.sources.main: org/pairs tran could not be loaded: ") and "train" in nowhere
    script = load(tmp_path, url, "org/script")
    assert script.startswith("data.sources.main: org/script train could not be loaded: ")
    assert "remote code was run" not in script and "refs/convert/parquet" in script
    server.kill()
    server.wait()
    assert load(tmp_path, url, "org/pairs", offline=True) == first
    missing = load(tmp_path / "empty", url, "org/pairs", offline=True)
    assert missing.startswith("data.sources.main: org/pairs train could not be loaded: ")
    assert "connection to the hub" in missing and "Traceback" not in missing
