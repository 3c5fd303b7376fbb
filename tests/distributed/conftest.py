"""Miniature models on disk, and a pipeline that has finished: what the tests here share."""

import subprocess
from pathlib import Path

import pytest
from miniature import launch as start
from miniature import miniature
from models_on_disk import make_models


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the miniature models are."""
    path = tmp_path_factory.mktemp("distributed")
    make_models(path)
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], subprocess.CompletedProcess[str]]:
    """A pipeline that has finished, as a user starts it: FOLDER/runs/first, its command line, and what that printed."""
    folder = tmp_path_factory.mktemp("pipeline")
    arguments = [*miniature(folder), "hardware=cpu", "memory=zero2"]
    done = start(*arguments, f"run_dir={folder / 'runs' / 'first'}")
    return folder / "runs" / "first", arguments, done
