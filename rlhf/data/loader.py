"""Global batches: the same for any number of ranks, of similar lengths, and resumable at any step."""

from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from rlhf.config.errors import DataError

Batch = TypeVar("Batch")
Collate = Callable[[list[dict[str, Any]]], Batch]
WINDOW_BATCHES = 16


def row_lengths(dataset: Any) -> NDArray[np.int64]:
    """Tokens of each row's longest sequence, [rows]."""
    prompt, chosen, rejected = (column_lengths(dataset, f"{name}_ids") for name in ("prompt", "chosen", "rejected"))
    return prompt + np.maximum(chosen, rejected)


def column_lengths(dataset: Any, column: str) -> NDArray[np.int64]:
    """Entries of each row's list in a column, [rows]; 0 where there is none. Reads offsets alone, no tokens."""
    import pyarrow
    import pyarrow.compute

    stored = dataset.data.column(column)
    if pyarrow.types.is_null(stored.type):
        return np.zeros(len(dataset), dtype=np.int64)
    lengths = pyarrow.compute.fill_null(pyarrow.compute.list_value_length(stored), 0).to_numpy()
    indices = dataset._indices.column(0).to_numpy() if dataset._indices is not None else slice(None)
    return np.asarray(lengths[indices], dtype=np.int64)


def source_codes(dataset: Any) -> tuple[list[str], NDArray[np.int32]]:
    """The names of the sources, and for each row the number of its own, [rows]."""
    encoded = dataset.data.column("source").dictionary_encode().unify_dictionaries()
    names = encoded.chunk(0).dictionary.to_pylist() if encoded.num_chunks else []
    codes = np.concatenate([chunk.indices.to_numpy() for chunk in encoded.chunks] or [np.empty(0, dtype=np.int32)])
    indices = dataset._indices.column(0).to_numpy() if dataset._indices is not None else slice(None)
    return names, codes[indices]


def fetch_rows(dataset: Any, indices: NDArray[np.int64]) -> list[dict[str, Any]]:
    """The rows at the given positions, as dicts."""
    columns = dataset[indices.tolist()]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


class GlobalLoader(Generic[Batch]):
    """Iterate over this rank's share of every global batch.

    Each epoch shuffles all rows, sorts them by length within windows of 16 batches, cuts the windows into global
    batches of `batch_size` rows, and shuffles the batches and the rows within them. Order and batches depend on the
    seed and the epoch alone; rank r of R takes rows [r·n/R, (r+1)·n/R) of a batch of n. The last, incomplete batch of
    an epoch is left out. `epochs=None` goes on without end. `source_counts` says how many rows of the last global batch
    are from which source.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        batch_size: int,
        collate: "Collate[Batch]",
        seed: int,
        rank: int,
        ranks: int,
        epochs: float | None,
        shuffle: bool = True,
    ) -> None:
        """Raise DataError if there is not one whole batch, ValueError if a batch cannot be divided among the ranks."""
        if batch_size % ranks:
            raise ValueError(f"a global batch of {batch_size} rows cannot be divided among {ranks} ranks")
        self.batches_per_epoch = len(dataset) // batch_size
        if not self.batches_per_epoch:
            raise DataError(
                f"the training part has {len(dataset)} rows, fewer than one batch of {batch_size}: "
                "lower the batch size or add data"
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.collate = collate
        self.seed = seed
        self.rank, self.ranks = rank, ranks
        self.steps = None if epochs is None else max(1, round(epochs * self.batches_per_epoch))
        self.shuffle = shuffle
        self.step = 0
        self._lengths = row_lengths(dataset) if shuffle else None
        self._sources = source_codes(dataset) if "source" in dataset.column_names else None
        self.source_counts: dict[str, int] = {}

    def __len__(self) -> int:
        """Global batches in all epochs; raises TypeError for an endless loader."""
        if self.steps is None:
            raise TypeError("a loader with epochs=None has no length")
        return self.steps

    def epoch_batches(self, epoch: int) -> NDArray[np.int64]:
        """Row positions of an epoch's global batches, [batches, batch_size]."""
        rows = len(self.dataset)
        if self._lengths is None:
            order = np.arange(rows)
            return order[: self.batches_per_epoch * self.batch_size].reshape(-1, self.batch_size)
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(rows)[: self.batches_per_epoch * self.batch_size]
        window = WINDOW_BATCHES * self.batch_size
        for start in range(0, len(order), window):
            piece = order[start : start + window]
            order[start : start + window] = piece[np.argsort(self._lengths[piece], kind="stable")]
        batches = order.reshape(-1, self.batch_size)[random.permutation(self.batches_per_epoch)]
        # Within a batch, length must not decide which rank or micro-batch a row goes to.
        return np.asarray(random.permuted(batches, axis=1), dtype=np.int64)

    def __iter__(self) -> Iterator[Batch]:
        """Go on from the current step to the end."""
        epoch, batches = -1, np.empty((0, 0), dtype=np.int64)
        while self.steps is None or self.step < self.steps:
            if self.step // self.batches_per_epoch != epoch:
                epoch = self.step // self.batches_per_epoch
                batches = self.epoch_batches(epoch)
            share = self.batch_size // self.ranks
            batch = batches[self.step % self.batches_per_epoch]
            indices = batch[self.rank * share : (self.rank + 1) * share]
            if self._sources is not None:
                names, codes = self._sources
                self.source_counts = {name: int((codes[batch] == code).sum()) for code, name in enumerate(names)}
            # Counted before the batch is handed out: a state saved after a training step does not repeat its batch.
            self.step += 1
            yield self.collate(fetch_rows(self.dataset, indices))

    def state_dict(self) -> dict[str, int]:
        """Where the loader stands; the same on all ranks and for any number of them."""
        return {"step": self.step, "seed": self.seed, "batch_size": self.batch_size, "rows": len(self.dataset)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where another loader of the same data, seed and batch size stood; raises ValueError for other data."""
        own = self.state_dict()
        different = [key for key in own if key != "step" and state[key] != own[key]]
        changed = [f"{key}: {state[key]} then, {own[key]} now" for key in different]
        if changed:
            raise ValueError(f"the loader's state belongs to other data ({'; '.join(changed)})")
        self.step = state["step"]


def eval_batches(
    dataset: Any, *, batch_size: int, collate: "Collate[Batch]", rank: int, ranks: int
) -> Iterator[tuple[Batch, int]]:
    """Yield (batch, valid) so that every row counts exactly once over all ranks and all ranks get equal batches.

    Only the first `valid` rows of a batch count. Where rows run out a rank gets a row once more, so that the batches of
    all ranks have equally many rows and forward passes that they must share (ZeRO-3) stay in step. `batch_size` is one
    rank's. Rows come in order of length, which keeps padding small.
    """
    order = np.argsort(row_lengths(dataset), kind="stable")
    for start in range(0, len(order), batch_size * ranks):
        shares = np.array_split(order[start : start + batch_size * ranks], ranks)
        filler = np.repeat(order[start : start + 1], len(shares[0]) - len(shares[rank]))
        yield collate(fetch_rows(dataset, np.concatenate([shares[rank], filler]))), len(shares[rank])
