"""Settings of all tests: one thread, a cache of their own, and annotations (tensor shapes too) checked at run time."""

import os
import sys
from typing import Any

import jaxtyping
import pytest
from ranks import Ranks, RanksError

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
    """With `pytest -n 2` a file's tests run in one process; so do those that share running ranks, or a trained model.

    xdist's own groups (`--dist loadgroup`) have no effect with pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.split("::")[0]
            if path.endswith(("distributed/test_pipeline.py", "distributed/test_sweep.py")):
                return "pipeline"
            return "ranks" if "distributed/" in path or path.endswith("rollout/test_families.py") else path

    config.option.loadscopereorder = False  # What takes longest begins early.
    return Together(config, log)


STARTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--fast`: only the tests that start no process, and not those of thousands of cases."""
    parser.addoption("--fast", action="store_true", help="no test that starts processes or looks at thousands of cases")


def pytest_configure(config: pytest.Config) -> None:
    """With `--fast` a test that starts a process fails: it has to be marked."""
    if not config.getoption("--fast"):
        return

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event in STARTS and "PYTEST_CURRENT_TEST" in os.environ:
            raise RuntimeError(f"a test that starts a process ({event}) has to be marked with `processes`")

    sys.addaudithook(refuse)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `--fast` leave out what starts processes, and what takes long."""
    if config.getoption("--fast"):
        left = [item for item in items if any(map(item.get_closest_marker, ("processes", "ranks", "exhaustive")))]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]


RANKS = pytest.StashKey[dict[int, Ranks]]()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Call the function of a test that is marked with `ranks` on so many ranks, and not here."""
    marker = pyfuncitem.get_closest_marker("ranks")
    if marker is None:
        return None
    (count,) = marker.args
    pools = pyfuncitem.config.stash.setdefault(RANKS, {})
    ranks = pools.setdefault(count, Ranks(count))
    names = pyfuncitem._fixtureinfo.argnames
    try:
        ranks.call(pyfuncitem.function, {name: pyfuncitem.funcargs[name] for name in names})
    except RanksError as error:
        pytest.fail(str(error), pytrace=False)
    return True


@pytest.hookimpl
def pytest_unconfigure(config: pytest.Config) -> None:
    """End the ranks that tests were called on."""
    for ranks in config.stash.get(RANKS, {}).values():
        ranks.stop()


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The cache of the whole test session; set RLHF_CACHE to keep one between sessions."""
    return os.environ.setdefault("RLHF_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def no_trials(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizers are tried in a process of their own, which only tests that are marked with `processes` start."""
    if request.node.get_closest_marker("processes") is None:
        monkeypatch.setattr("rlhf.models.door._tried", lambda *_: ("", 0, ""))
