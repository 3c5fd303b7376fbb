"""Settings of all tests: one thread, a cache of their own, and annotations (tensor shapes too) checked at run time."""

import os
from typing import Any

import jaxtyping
import pytest

# Ranks and workers that tests start inherit these.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Before the first import of these modules, which are the ones that compute with tensors.
CHECKED_MODULES = ["rlhf.batch", "rlhf.functional", "rlhf.rollout"]
jaxtyping.install_import_hook(CHECKED_MODULES, "runtime_types.checked")

import torch  # noqa: E402 - after the number of threads is set
from hypothesis import settings  # noqa: E402

torch.set_num_threads(1)
settings.register_profile("rlhf", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("rlhf")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `pytest -n 2` a file's tests run in one process, and so do all of distributed/, which share trained models.

    xdist's own groups (`--dist loadgroup`) have no effect with pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.split("::")[0]
            return "distributed" if "distributed/" in path else path

    config.option.loadscopereorder = False  # What takes longest begins early.
    return Together(config, log)


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The cache of the whole test session; set RLHF_CACHE to keep one between sessions."""
    return os.environ.setdefault("RLHF_CACHE", str(tmp_path_factory.mktemp("cache")))
