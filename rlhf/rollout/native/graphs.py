"""Steps of decoding as CUDA graphs: recorded once and replayed, so that the GPU does not wait for the host.

A step of a small model is hundreds of kernels of some microseconds each, which Python cannot launch fast enough. A
graph holds the addresses of what it reads and writes: those of the weights, the cache and the slots. So the slots are
kept here, graphs are kept from rollout to rollout as long as no address changes, and where the weights are copied anew
for each rollout the steps are recorded anew.
"""

import gc
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from rlhf.models.decoder.weights import DecoderWeights
from rlhf.rollout.native.arena import Arena
from rlhf.rollout.native.slots import Slots, empty_slots
from rlhf.rollout.sampling import Sampling

_log = logging.getLogger(__name__)
LENGTH_STEP = 64  # A graph reads this many tokens of the cache, or a multiple; from 512 on an eighth of a power of two.
MOST_GRAPHS = 64  # A graph takes memory beside torch's; beyond these, steps are run as they are.
MOST_FAILURES = 2


class StepGraphs:
    """Graphs of the steps for a number of sequences and a length of the cache.

    A step of a new kind is run as it is, which also loads its kernels; the second is recorded; then it is replayed.

    Args:
        record: whether steps are recorded. Without, they are run in the same sizes.

    Attributes:
        nbytes: device memory that recording took, as far as torch knows it.
    """

    def __init__(self, *, record: bool) -> None:
        self.record, self.nbytes = record, 0
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._met: set[tuple[int, int]] = set()
        self._fixed: tuple[int, ...] = ()
        self._slots: Slots | None = None
        self._sampling: Sampling | None = None
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None
        self._failed: list[torch.cuda.CUDAGraph] = []  # The allocator may still refer to them.

    def slots(self, weights: DecoderWeights, arena: Arena, sampling: Sampling, size: int) -> Slots:
        """Free slots for a rollout, those of before if they serve; what was recorded with others is forgotten."""
        known = self._slots
        if known is None or self._sampling != sampling or not size <= len(known.tokens) <= arena.slots:
            self.release()
            known, self._sampling = empty_slots(weights, sampling, size), sampling
            self._slots = known
        known.prompts.clear()
        known.lengths.clear()
        known.positions.zero_()  # Those that are not taken take part in steps, too.
        fixed = (arena.slots, arena.length, *(tensor.data_ptr() for tensor in (*weights.tensors(), *arena.tensors())))
        if fixed != self._fixed:
            self.forget()
            self._fixed = fixed
        return known

    def sizes(self, *, count: int, length: int, size: int, room: int) -> tuple[int, int]:
        """The sequences and the length of the cache of the step that is run instead of an exact one: few kinds."""
        wide = size
        while wide >= 2 * count:
            wide = -(-wide // 2)
        step = max(LENGTH_STEP, 1 << max(0, (length - 1).bit_length() - 3))
        return wide, min(room, -(-length // step) * step)

    def step(self, kind: tuple[int, int], run: Callable[[], None]) -> None:
        """Run a step of a kind, or replay it. `run` must do on the device all that it does."""
        graph = self._graphs.get(kind)
        if graph is None and self.record and kind in self._met and len(self._graphs) < MOST_GRAPHS:
            graph = self._recorded(run)
            if graph is not None:
                self._graphs[kind] = graph
        self._met.add(kind)
        if graph is None:
            run()
        else:
            graph.replay()

    @property
    def recorded(self) -> int:
        """How many kinds of steps are replayed."""
        return len(self._graphs)

    def forget(self) -> None:
        """Give back what was recorded."""
        self._graphs.clear()
        self._met.clear()
        self._pool, self.nbytes = None, 0

    def release(self) -> None:
        """Give all memory back."""
        self.forget()
        self._slots, self._sampling, self._fixed = None, None, ()

    def _recorded(self, run: Callable[[], None]) -> "torch.cuda.CUDAGraph | None":
        present = torch.cuda.current_stream()
        beside = self._stream = self._stream or torch.cuda.Stream()  # type: ignore[no-untyped-call]
        if not self._graphs:
            # Recording allocates from a pool of its own, and cannot take what torch keeps for others.
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            self._pool = torch.cuda.graph_pool_handle()  # One for all graphs: nothing in it outlives a step.
        before, collects, graph = torch.cuda.memory_reserved(), gc.isenabled(), torch.cuda.CUDAGraph()
        beside.wait_stream(present)
        gc.disable()  # What it would free now would disturb the recording.
        try:
            with torch.cuda.stream(beside):
                # Only this thread's calls count: NCCL's watchdog makes its own.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    run()
                except BaseException:
                    with suppress(RuntimeError):
                        graph.capture_end()
                    raise
                graph.capture_end()
        except RuntimeError as error:
            self._give_up(graph, error)
            return None
        finally:
            present.wait_stream(beside)
            if collects:
                gc.enable()
        self.nbytes += max(0, torch.cuda.memory_reserved() - before)
        return graph

    def _give_up(self, graph: "torch.cuda.CUDAGraph", error: RuntimeError) -> None:
        """Nothing that was recorded has run; the allocator is told that recording is over, if it does not know."""
        device = torch.cuda.current_device()
        with suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(device, self._pool)
            torch._C._cuda_releasePool(device, self._pool)
        self._failed.append(graph)
        self.forget()
        with suppress(RuntimeError, AttributeError):
            graph.reset()  # Of a recording that ended, the memory comes back.
        with suppress(RuntimeError, AttributeError):
            # Before 2.13 torch's random numbers are left waiting for the recording's end; a new state does not wait.
            generator = torch.cuda.default_generators[device]
            generator.graphsafe_set_state(generator.clone_state())
        if isinstance(error, torch.OutOfMemoryError) and len(self._failed) < MOST_FAILURES:
            return
        self.record = False
        reason = str(error).splitlines()[0]
        _log.warning("steps of generation are not recorded as CUDA graphs, which is slower: %s", reason)
