"""`kind: function`: a Python function of the user's own. It runs in every rank, with the user's rights."""

import ast
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf.config.errors import ConfigError
from rlhf.config.schema import ScorerConfig

KEY = "scorer.function"


def problems(config: ScorerConfig) -> list[str]:
    """A reference that is missing, of another form, or to nothing; no code is run to find out."""
    try:
        check_reference(config.function, key=KEY)
    except ConfigError as error:
        return list(error.problems)
    return []


def score_function(config: ScorerConfig) -> Any:
    """The function itself."""
    return load_reference(config.function, key=KEY)


def check_reference(reference: str | None, *, key: str) -> tuple[str, str]:
    """Split FILE.py:NAME or MODULE:NAME; raises ConfigError if there is no such file, module or name in the file."""
    where, _, name = (reference or "").rpartition(":")
    if not where or not name.isidentifier():
        raise ConfigError(f"{key}={reference}: give FILE.py:NAME or MODULE:NAME of a Python function")
    if not where.endswith(".py"):
        try:
            found = importlib.util.find_spec(where)
        except (ImportError, ValueError):
            found = None
        if found is None:
            raise ConfigError(f"{key}={reference}: there is no module {where}; is it installed, or on PYTHONPATH?")
        return where, name
    path = Path(where).expanduser().resolve()
    try:
        tree = ast.parse(path.read_bytes(), filename=str(path))
    except OSError as error:
        raise ConfigError(f"{key}={reference}: {path} cannot be read: {error.strerror}") from error
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{key}={reference}: {path} is not valid Python: {error}") from error
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    names |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    if name not in names:
        raise ConfigError(f"{key}={reference}: {path} defines no {name}")
    return str(path), name


def load_reference(reference: str | None, *, key: str) -> Any:
    """Import what FILE.py:NAME or MODULE:NAME names; raises ConfigError if that fails or it cannot be called."""
    where, name = check_reference(reference, key=key)
    try:
        module = _from_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except Exception as error:
        raise ConfigError(f"{key}={reference}: importing it failed: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{key}={reference}: {where} has no function {name}")
    return function


def _from_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"rlhf_user_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
