"""How a configuration field is declared: one call gives its default, its documentation and its bounds."""

import math
from collections.abc import Callable
from dataclasses import MISSING, Field, field, fields
from typing import Any

LARGEST = 2**53  # No count is larger, and every integer up to here is exact as a float.


def option(
    default: Any, doc: str, *, minimum: float | None = None, above: float | None = None, maximum: float | None = None
) -> Any:
    """Declare a field with a plain default value, its documentation, and the numbers that it may be.

    `minimum` and `maximum` may be reached, `above` may not.
    """
    return field(default=default, metadata={"doc": doc, "minimum": minimum, "above": above, "maximum": maximum})


def option_factory(factory: Callable[[], Any], doc: str, *, escapes: bool = False) -> Any:
    """Declare a field whose default is built anew for every instance, with its documentation.

    `escapes`: it is a list of texts in which the command line may write \\n, \\t, \\r and \\\\.
    """
    return field(default_factory=factory, metadata={"doc": doc, "escapes": escapes})


def field_doc(declared: "Field[Any]") -> str:
    """Return the documentation that a field was declared with ("" if none)."""
    return str(declared.metadata.get("doc", ""))


def bounds(declared: "Field[Any]") -> str:
    """The numbers that a field may be, in words ("" if any)."""
    minimum, above, maximum = (declared.metadata.get(name) for name in ("minimum", "above", "maximum"))
    words = []
    if minimum is not None:
        words.append(f"at least {minimum:g}")
    if above is not None:
        words.append(f"above {above:g}")
    if maximum is not None:
        words.append(f"at most {maximum:g}")
    return " and ".join(words)


def demand(declared: "Field[Any]", value: Any) -> str:
    """What a number has to be and is not, in words, else ""; null and what is no number are left alone."""
    if type(value) is not int and type(value) is not float:  # A Boolean is no number.
        return ""
    if type(value) is float and not math.isfinite(value):
        return "a finite number"
    known = declared.metadata
    if type(value) is int and abs(value) > LARGEST:
        return f"at most {known.get('maximum') or LARGEST:g}"
    minimum, above, maximum = known.get("minimum"), known.get("above"), known.get("maximum")
    inside = (
        (minimum is None or value >= minimum)
        and (above is None or value > above)
        and (maximum is None or value <= maximum)
    )
    return "" if inside else bounds(declared)


def undocumented(config_class: type) -> list[str]:
    """Return the names of the fields of a config dataclass that lack documentation or a default."""
    return [
        entry.name
        for entry in fields(config_class)
        if not field_doc(entry) or (entry.default is MISSING and entry.default_factory is MISSING)
    ]
