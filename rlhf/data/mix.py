"""How many rows of each source enter a training part."""

from collections.abc import Mapping

from rlhf.config.errors import ConfigError


def mix_sizes(available: Mapping[str, int], weights: Mapping[str, float | None]) -> dict[str, int]:
    """Rows to take of each source so that they are in the proportion of the weights and none is repeated.

    With weights w (normalised to sum 1 over the sources that have rows) and n rows available, an epoch has
    N = min_i n_i / w_i rows, floor(w_i N) of each source: the source that would run out first bounds it. Weights that
    are all null take every row. A source without rows does not bound the others.
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
    rows = min(available[name] * total / weight for name, weight in used.items())
    # The tolerance keeps a source that fills its share exactly from losing a row to rounding.
    return {name: min(available[name], int(used.get(name, 0.0) / total * rows + 1e-6)) for name in available}


def mix_reports(part: str, available: Mapping[str, int], taken: Mapping[str, int]) -> list[str]:
    """Sentences for the user on the sources that are absent from a part or give up a tenth of their rows or more."""
    found: list[str] = []
    if not any(available.values()):
        return found
    for name, rows in available.items():
        if rows == 0:
            found.append(f"{part}: the source {name} has no usable row here; the others share its weight")
        elif taken[name] <= 0.9 * rows:
            found.append(f"{part}: {taken[name]} of {rows} rows of {name} are used at its weight")
    return found
