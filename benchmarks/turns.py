"""What several ways of doing the same take, in turns, and what the machine can do."""

import ctypes
import gc
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """A list that gets how many MiB more this process has at most within than before, looked at every millisecond."""
    import psutil

    process, done, found = psutil.Process(), threading.Event(), [0.0]
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # What earlier work left would make this one look small.
    before = process.memory_info().rss

    def watch() -> None:
        while not done.wait(0.001):
            found[0] = max(found[0], (process.memory_info().rss - before) / 2**20)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


def take_turns(
    ways: dict[str, Callable[[], int]], *, turns: int
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, float]]:
    """Each way's tokens per second and seconds in every turn, the ways one after the other in each; and its memory.

    The memory in MiB is what the process takes more at most in the first turn, which warms up and is not timed.
    """
    from rlhf.engine.distributed import barrier

    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    memory = {}
    next(iter(ways.values()))()  # What is made once in a process.
    for name, way in ways.items():
        with peak_memory() as peak:
            way()
        memory[name] = peak[0]
    for _ in range(turns):
        for name, way in ways.items():
            barrier()
            started = time.perf_counter()
            tokens = way()
            barrier()
            seconds = time.perf_counter() - started
            found[name].append((tokens / seconds, seconds))
    return found, memory


@dataclass(frozen=True, kw_only=True, slots=True)
class Speeds:
    """What `take_turns` found."""

    turns: dict[str, list[tuple[float, float]]]

    def rate(self, way: str) -> float:
        """Median tokens per second."""
        return statistics.median(rate for rate, _ in self.turns[way])

    def seconds(self, way: str) -> float:
        """Median seconds."""
        return statistics.median(seconds for _, seconds in self.turns[way])

    def ratio(self, way: str, other: str) -> float:
        """Median over the turns of one way's tokens per second relative to another one's."""
        pairs = zip(self.turns[way], self.turns[other], strict=True)
        return statistics.median(mine / theirs for (mine, _), (theirs, _) in pairs)


def machine_limits() -> dict[str, float]:
    """Bytes that this process reads from memory in a second, and bf16 operations that it multiplies in one."""
    import torch

    large = torch.ones(2**27)  # 512 MiB: more than any cache.
    square = torch.randn(1024, 1024).bfloat16()

    def best(work: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    return {"bytes": large.nbytes / best(large.sum), "operations": 2 * 1024**3 / best(lambda: square @ square)}
