"""The checker of annotations that the test suite puts on every function of the package."""

from collections.abc import Callable
from typing import Any

import beartype


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check arguments and results at every call; methods that speak of `Self` are left alone (beartype cannot)."""
    hints = getattr(function, "__annotations__", {}).values()
    return function if any("typing.Self" in str(hint) for hint in hints) else beartype.beartype(function)
