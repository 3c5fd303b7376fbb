"""How many rows of each source enter a training part, and in which order they stand."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf.config.errors import ConfigError
from rlhf.config.schema import Exhausted


def mix_sizes(
    available: Mapping[str, int], weights: Mapping[str, float | None], exhausted: Exhausted = Exhausted.stop
) -> dict[str, int]:
    """Rows to take of each source so that they are in the proportion of the weights.

    With weights w (normalised to sum 1 over the sources that have rows) and n rows available, an epoch has
    N = min_i n_i / w_i rows, floor(w_i N) of each source: the source that would run out first bounds it, and no row is
    repeated. With exhausted=repeat it is N = max_i n_i / w_i, and the other sources begin again. Weights that are all
    null take every row. A source without rows does not bound the others.
    """
    given = [weight for weight in weights.values() if weight is not None]
    if not given:
        return dict(available)
    if len(given) < len(weights):
        unset = ", ".join(name for name, weight in weights.items() if weight is None)
        raise ConfigError(f"data.sources: {unset} has no weight while others have: set `weight` for all or for none")
    used = {name: float(weights[name] or 0.0) for name in available if weights[name] and available[name]}
    if not used:
        return dict.fromkeys(available, 0)
    total = sum(used.values())
    bound = max if exhausted is Exhausted.repeat else min
    rows = bound(available[name] * total / weight for name, weight in used.items())
    # The tolerance keeps a source that fills its share exactly from losing a row to rounding.
    sizes = {name: int(used.get(name, 0.0) / total * rows + 1e-6) for name in available}
    return sizes if exhausted is Exhausted.repeat else {name: min(available[name], sizes[name]) for name in sizes}


def mix_order(
    rows: NDArray[Any],
    available: Mapping[str, int],
    weights: Mapping[str, float | None],
    exhausted: Exhausted,
) -> NDArray[np.int64]:
    """Positions of the rows of a part in the order in which they stand; one that is repeated occurs again.

    `rows` has the fields source (an index into `available`), choose and order: hashes, so that an added row disturbs no
    other. A source's rows are taken in the order of `choose` and stand in the order of `order`.
    """
    sizes = mix_sizes(available, weights, exhausted)
    taken = []
    by_choice = np.argsort(rows["choose"], kind="stable")
    for number, size in enumerate(sizes.values()):
        mine = by_choice[rows["source"][by_choice] == number]
        taken.append(np.resize(mine, size) if len(mine) else mine)
    # Another hash: the rows kept of a source that gives up many would else all stand at the beginning.
    chosen = np.concatenate(taken) if taken else np.empty(0, dtype=np.int64)
    # Of rows with equal hashes, as before: the one that was chosen first.
    rank = np.empty(len(rows), dtype=np.int64)
    rank[by_choice] = np.arange(len(rows))
    chosen = chosen[np.argsort(rank[chosen], kind="stable")]
    return np.asarray(chosen[np.argsort(rows["order"][chosen], kind="stable")], dtype=np.int64)


def mix_reports(part: str, available: Mapping[str, int], taken: Mapping[str, int]) -> list[str]:
    """Sentences for the user on the sources that are absent from a part, give up a tenth of their rows, or repeat."""
    found: list[str] = []
    if not any(available.values()):
        return found
    for name, rows in available.items():
        if rows == 0:
            found.append(f"{part}: the source {name} has no usable row here; the others share its weight")
        elif taken[name] <= 0.9 * rows:
            found.append(f"{part}: {taken[name]} of {rows} rows of {name} are used at its weight")
        elif taken[name] > rows:
            found.append(f"{part}: the {rows} rows of {name} are repeated to {taken[name]} at its weight")
    return found
