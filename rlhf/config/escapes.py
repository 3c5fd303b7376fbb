"""What stands for line breaks in texts that are given on the command line."""

import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from rlhf.config.origins import COMMAND_LINE, origin_of

_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


def read_escapes(config: Any, origins: Mapping[str, str], prefix: str = "") -> None:
    r"""Turn \\n, \\t, \\r and \\\\ into what they stand for, in place, in texts that the command line gives.

    Hydra leaves a backslash there as it is, while YAML reads such texts in double quotes by itself.
    """
    for entry in fields(config):
        value, key = getattr(config, entry.name), f"{prefix}{entry.name}"
        if is_dataclass(value):
            read_escapes(value, origins, f"{key}.")
        elif isinstance(value, dict):
            for name, inner in value.items():
                if is_dataclass(inner):
                    read_escapes(inner, origins, f"{key}.{name}.")
        elif entry.metadata.get("escapes") and origin_of(key, dict(origins)) == COMMAND_LINE:
            setattr(config, entry.name, [re.sub(r"\\([ntr\\])", _unescaped, text) for text in value])


def _unescaped(found: re.Match[str]) -> str:
    return _ESCAPES[found.group(1)]
