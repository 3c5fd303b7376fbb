"""Metrics over ranks: sums and counts, reduced in one collective per step and read by the host only then."""

import zlib
from collections.abc import Callable

import torch
from torch import Tensor

_CAPACITY = 192
_HEADER = 5  # ranks, and sum and sum of squares of two halves of a checksum of the names


class MetricAccumulator:
    """Collects metrics during a step and gives their means over everything that all ranks added.

    A metric is sum(totals) / sum(counts), over all calls and ranks, so a masked mean is right when ranks hold different
    numbers of tokens; the mean of the ranks' means would not be. Tensors stay on `device` until `flush`: adding never
    waits for the device.
    """

    def __init__(self, *, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._totals: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}

    def add(self, name: str, total: float | Tensor, count: float | Tensor = 1) -> None:
        """Add `total`, a sum over `count` items (tokens, sequences, calls), to the metric `name`.

        Tensors hold one element each. Raises ValueError for a tensor with more: its sum has to be taken first.
        """
        total, count = self._scalar(name, total), self._scalar(name, count)
        self._totals[name] = total + self._totals[name] if name in self._totals else total
        self._counts[name] = count + self._counts[name] if name in self._counts else count

    def maximum(self, name: str, value: float | Tensor) -> None:
        """Let the metric `name` be the largest of the values given on any rank. A NaN wins over every number."""
        value = self._scalar(name, value)
        self._maxima[name] = torch.maximum(value, self._maxima[name]) if name in self._maxima else value

    def flush(
        self,
        all_reduce_sum: Callable[[Tensor], Tensor] | None = None,
        all_reduce_max: Callable[[Tensor], Tensor] | None = None,
    ) -> dict[str, float]:
        """Reduce over the ranks, forget everything and return the metrics by name; a count of 0 gives NaN.

        The two functions reduce a 1-D float64 tensor over all ranks and return the result; None means that there is one
        rank. All sums and counts go into one call; maxima, if there are any, take a second. Raises ValueError on every
        rank if the ranks did not add the same names.
        """
        names, peaks = sorted(self._totals), sorted(self._maxima)
        if len(names) > _CAPACITY:
            raise ValueError(f"{len(names)} metrics in one step: at most {_CAPACITY} can be reduced together")
        sums = self._vector([self._totals[name] for name in names])
        counts = self._vector([self._counts[name] for name in names])
        highest = self._vector([self._maxima[name] for name in peaks])
        self._totals, self._counts, self._maxima = {}, {}, {}
        if all_reduce_sum is not None:
            # The length is fixed so that ranks which disagree about the names still meet in the same collective.
            padding = torch.zeros(2 * (_CAPACITY - len(names)), dtype=torch.float64, device=self._device)
            message = torch.cat([self._checksum(names, peaks), sums, counts, padding])
            reduced = all_reduce_sum(message)
            _require_same_names(reduced[:_HEADER].tolist(), names + peaks)
            middle = _HEADER + len(names)
            sums, counts = reduced[_HEADER:middle], reduced[middle : middle + len(names)]
        if all_reduce_max is not None and peaks:
            highest = all_reduce_max(highest)
        values = torch.cat([sums / counts, highest]).tolist()
        return dict(zip(names + peaks, values, strict=True))

    def _scalar(self, name: str, value: float | Tensor) -> Tensor:
        if not isinstance(value, Tensor):
            return torch.tensor(float(value), dtype=torch.float64, device=self._device)
        if value.numel() != 1:
            raise ValueError(f"metric {name!r}: a tensor of shape {list(value.shape)} where one number is needed")
        return value.detach().reshape(()).to(self._device, torch.float64, non_blocking=True)

    def _vector(self, values: list[Tensor]) -> Tensor:
        if not values:
            return torch.zeros(0, dtype=torch.float64, device=self._device)
        return torch.stack([value.to(self._device) for value in values])

    def _checksum(self, names: list[str], peaks: list[str]) -> Tensor:
        checksum = zlib.crc32("\n".join([*names, "", *peaks]).encode())
        low, high = checksum & 0xFFFF, checksum >> 16
        return torch.tensor([1, low, low**2, high, high**2], dtype=torch.float64, device=self._device)


def _require_same_names(header: list[float], names: list[str]) -> None:
    # Over n ranks, n * sum(x^2) = sum(x)^2 holds only if all x are equal (Cauchy-Schwarz). 16-bit x keep it exact.
    ranks, low, low_squares, high, high_squares = header
    if ranks * low_squares != low**2 or ranks * high_squares != high**2:
        raise ValueError(
            "the ranks added different metrics in the same step, so they cannot be reduced together: every rank has to "
            f"add every name (a total and count of 0 will do). This rank added: {', '.join(names) or 'none'}"
        )
