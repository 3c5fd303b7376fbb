"""Errors that are the user's to fix. Each message says what is wrong, where, and what to do."""

from collections.abc import Sequence


def listed(problems: Sequence[str]) -> str:
    """One message for all problems, each named once."""
    unique = list(dict.fromkeys(problems))
    if len(unique) < 2:
        return "".join(unique)
    lines = "\n".join(f"  - {problem}" for problem in unique)
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
        super().__init__(
            f"the package '{package}' is needed for {purpose} but is not installed: "
            f"run  pip install '.[{extra}]' -c constraints.txt  in the project's directory"
        )
