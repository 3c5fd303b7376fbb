"""Reports functions and files that are too long: `python tests/size_limits.py PATH…` (part of `make check`)."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 400


def too_long(path: Path) -> Iterator[str]:
    """Messages about one Python file; a function's decorators are not counted, its docstring is."""
    text = path.read_text(encoding="utf-8")
    lines = len(text.splitlines())
    if lines > MAX_FILE_LINES:
        yield f"{path}: {lines} lines, at most {MAX_FILE_LINES}: split the file"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield f"{path}:{node.lineno}: {node.name} has {lines} lines, at most {MAX_FUNCTION_LINES}: split it"


def main(arguments: list[str]) -> int:
    """Check files and folders; 1 if anything is too long."""
    roots = [Path(argument) for argument in arguments]
    files = [path for root in roots for path in (sorted(root.rglob("*.py")) if root.is_dir() else [root])]
    messages = [message for path in files for message in too_long(path)]
    print("\n".join(messages) or f"{len(files)} files within {MAX_FILE_LINES} lines, functions {MAX_FUNCTION_LINES}")
    return 1 if messages else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
