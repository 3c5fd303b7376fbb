"""The files of a run directory: their names, how they are appended to and how they are read back. No torch."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.config.writing import write_json as write_json

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
PROGRESS = "progress.jsonl"
SUMMARY = "summary.json"
COMMAND = "command.txt"
CONFIG = "config.yaml"
STAGES = ("sft", "rm", "ppo")


Sample = Mapping[str, Any]
"""{"prompt": str, "responses": {model or side: {"text": str, "tokens": int, "ended": bool, "score": float if any}}}"""


def finite(value: float) -> float | None:
    """The value, or None if it is infinite or not a number: JSON has neither."""
    return float(value) if math.isfinite(value) else None


def finite_only(value: Any) -> Any:
    """The same with None for each number, however deep, that is infinite or not a number."""
    if isinstance(value, float):
        return finite(value)
    if isinstance(value, Mapping):
        return {key: finite_only(inner) for key, inner in value.items()}
    return [finite_only(inner) for inner in value] if isinstance(value, list | tuple) else value


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON object as a line that a concurrent reader sees whole or not at all."""
    line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
    with path.open("ab", buffering=0) as file:
        file.write(line.encode())


def say(run_dir: Path, text: str, *, transient: bool = False) -> None:
    """Show a line on the terminal of whoever follows the run; a transient one is overwritten by the next."""
    append_row(run_dir / PROGRESS, {"text": text, "transient": transient})


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; a missing file has none. A line cut short by a crash is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one if the file is missing or broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return value if isinstance(value, dict) else {}
