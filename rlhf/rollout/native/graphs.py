"""Steps of decoding as CUDA graphs: recorded once and replayed, so that the GPU does not wait for the host.

A step of a small model is hundreds of kernels of some microseconds each, which Python cannot launch fast enough. A
graph holds the addresses of what it reads and writes: those of the weights, the cache and the slots. So the slots are
kept here, graphs are kept from rollout to rollout as long as no address changes, and where the weights are copied anew
for each rollout the steps are recorded anew.
"""

import gc
import logging
from collections.abc import Callable

import torch

from rlhf.models.decoder.weights import DecoderWeights
from rlhf.rollout.native.arena import Arena
from rlhf.rollout.native.slots import Slots, empty_slots
from rlhf.rollout.sampling import Sampling

_log = logging.getLogger(__name__)
LENGTH_STEP = 64  # A graph reads this many tokens of the cache, or a multiple.


class StepGraphs:
    """Graphs of the steps for a number of sequences and a length of the cache.

    A step of a new kind is run as it is, which also loads its kernels; the second is recorded; then it is replayed.

    Args:
        record: whether steps are recorded. Without, they are run in the same sizes.
    """

    def __init__(self, *, record: bool) -> None:
        self.record = record
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._met: set[tuple[int, int]] = set()
        self._fixed: tuple[int, ...] = ()
        self._slots: Slots | None = None
        self._made_for: tuple[Sampling, int] | None = None
        self._stream: torch.cuda.Stream | None = None

    def slots(self, weights: DecoderWeights, arena: Arena, sampling: Sampling, size: int) -> Slots:
        """Free slots for a rollout, the same as before where they can be; what was recorded elsewhere is forgotten."""
        if self._slots is None or self._made_for != (sampling, size):
            self.release()
            self._slots, self._made_for = empty_slots(weights, sampling, size), (sampling, size)
        self._slots.prompts.clear()
        self._slots.lengths.clear()
        cache = (*arena.keys, *arena.values)
        fixed = (arena.length, *(tensor.data_ptr() for tensor in (*weights.tensors(), *cache)))
        if fixed != self._fixed:
            self._forget()
            self._fixed = fixed
        return self._slots

    def sizes(self, *, count: int, length: int, size: int, room: int) -> tuple[int, int]:
        """The sequences and the length of the cache of the step that is run instead of an exact one: few kinds."""
        wide = size
        while wide >= 2 * count:
            wide = -(-wide // 2)
        return wide, min(room, -(-length // LENGTH_STEP) * LENGTH_STEP)

    def step(self, kind: tuple[int, int], run: Callable[[], None]) -> None:
        """Run a step of a kind, or replay it. `run` must do on the device all that it does."""
        graph = self._graphs.get(kind)
        if graph is None and (not self.record or kind not in self._met):
            self._met.add(kind)
            run()
            return
        if graph is None:
            graph = self._recorded(run)
            if graph is None:
                run()
                return
            self._graphs[kind] = graph
        graph.replay()

    @property
    def recorded(self) -> int:
        """How many kinds of steps are replayed."""
        return len(self._graphs)

    def release(self) -> None:
        """Give all memory back."""
        self._forget()
        self._slots, self._made_for, self._fixed = None, None, ()

    def _forget(self) -> None:
        self._graphs.clear()
        self._met.clear()

    def _recorded(self, run: Callable[[], None]) -> "torch.cuda.CUDAGraph | None":
        graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
        # One pool for all: nothing in it outlives a step.
        pool = next((other.pool() for other in self._graphs.values()), None)
        present = torch.cuda.current_stream()
        beside = self._stream = self._stream or torch.cuda.Stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(present)
        gc.disable()  # What it would free now would disturb the recording.
        try:
            with torch.cuda.stream(beside):
                # Only this thread's calls count: NCCL's watchdog makes its own.
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    run()
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            self.record = False
            reason = str(error).splitlines()[0]
            _log.warning("steps of generation are not recorded as CUDA graphs, which is slower: %s", reason)
            return None
        finally:
            present.wait_stream(beside)
            if collects:
                gc.enable()
        return graph
