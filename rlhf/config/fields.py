"""How a configuration field is declared: one call gives its default and its documentation."""

from collections.abc import Callable
from dataclasses import MISSING, Field, field, fields
from typing import Any


def option(default: Any, doc: str) -> Any:
    """Declare a field with a plain default value and its documentation."""
    return field(default=default, metadata={"doc": doc})


def option_factory(factory: Callable[[], Any], doc: str) -> Any:
    """Declare a field whose default is built anew for every instance, with its documentation."""
    return field(default_factory=factory, metadata={"doc": doc})


def field_doc(declared: "Field[Any]") -> str:
    """Return the documentation that a field was declared with ("" if none)."""
    return str(declared.metadata.get("doc", ""))


def undocumented(config_class: type) -> list[str]:
    """Return the names of the fields of a config dataclass that lack documentation or a default."""
    return [
        entry.name
        for entry in fields(config_class)
        if not field_doc(entry) or (entry.default is MISSING and entry.default_factory is MISSING)
    ]
