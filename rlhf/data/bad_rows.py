"""Rows that cannot be used, told by what is wrong with them: a fault that many rows share is told once."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

LISTED = 20
# Reasons that are kept apart: where every row has one of its own, the first ones are enough.
_KEPT = 1000
_LONGEST = 400
# Rows with the same fault of which it is said where they are.
_NAMED = 4


@dataclass(slots=True)
class BadRows:
    """The bad rows of one source by reason: how many, and where the first of them are."""

    number: int = 0
    _places: dict[str, list[str]] = field(default_factory=dict)
    _count: Counter[str] = field(default_factory=Counter)

    def add(self, where: str, reason: str) -> None:
        """Count a row."""
        self.number += 1
        reason = reason if len(reason) <= _LONGEST else f"{reason[:_LONGEST]}…"
        if reason not in self._count and len(self._count) == _KEPT:
            return
        self._count[reason] += 1
        places = self._places.setdefault(reason, [])
        if len(places) < _NAMED:
            places.append(where)

    def listed(self) -> str:
        """The first reasons, one in a line."""
        lines = []
        for reason, places in list(self._places.items())[:LISTED]:
            more = self._count[reason] - 1
            told = f" (and {more} more row{'s' if more > 1 else ''}: {_others(places, more)})" if more else ""
            lines.append(f"{places[0]}: {reason}{told}")
        left = self.number - sum(self._count[reason] for reason in list(self._places)[:LISTED])
        return "\n  ".join([*lines, f"… and {left} more"] if left else lines)

    def message(self, source: str, *, rows: int) -> str:
        """What is told of a source with so many rows."""
        which = f"{self.number} row{'s' if self.number > 1 else ''}"
        which = f"all {which}" if self.number == rows > 1 else which
        return f"data.sources.{source}: {which} cannot be used:\n  {self.listed()}\n{_REMEDY}"


_REMEDY = "Repair them, or set data.on_bad_row=skip to leave them out"


def joined(problems: Sequence[str]) -> str:
    """One message of several, with what to do about bad rows once at its end."""
    bare = [problem.removesuffix(f"\n{_REMEDY}") for problem in problems]
    return "\n".join(bare if bare == list(problems) else [*bare, _REMEDY])


def _others(places: Sequence[str], number: int) -> str:
    """Where rows are beside the first: of the same file the number alone."""
    first = re.sub(r"\d+$", "", places[0])
    named = [place.removeprefix(first) for place in places[1:]]
    return ", ".join([*named, "…"] if number > len(named) else named)
