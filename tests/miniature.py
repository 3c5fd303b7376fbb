"""The whole pipeline in miniature, as a user starts it: launch.py, the real launcher, two ranks."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORDS = ["film", "story", "plot", "cast", "scene", "music", "hero", "end", "joke", "shot"]


def launch(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run launch.py in the way that the README says, in a folder if one is given."""
    return subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        cwd=folder,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
    )


def launch_all(jobs: dict[str, list[str]], folder: Path) -> dict[str, subprocess.CompletedProcess[str]]:
    """Run launch.py several times at once: a start is mostly one process that imports libraries."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        started = {name: pool.submit(launch, *arguments, folder=folder) for name, arguments in jobs.items()}
        return {name: future.result() for name, future in started.items()}


def write_rows(path: Path) -> Path:
    """A hundred preference pairs."""
    rows = [
        {
            "prompt": f"Tell me about the {first} and the {second}.",
            "chosen": f"The {first} was good, the {second} lovely.",
            "rejected": f"The {first} was bad, the {second} awful.",
        }
        for first in WORDS
        for second in WORDS
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def small_model(folder: Path) -> list[str]:
    """Overrides for the rows above and a model of a few thousand parameters; the cache is in the folder, too."""
    return [
        *(
            "data=files",
            f"data.sources.main.path={write_rows(folder / 'pairs.jsonl')}",
            f"cache_dir={folder / 'cache'}",
        ),
        *("data.max_prompt_length=64", "data.max_response_length=32", "data.split.held_out=0.2"),
        *("model.scratch.vocab_size=320", "model.scratch.hidden_size=32", "model.scratch.num_layers=2"),
        *("model.scratch.num_heads=2", "model.scratch.intermediate_size=64"),
    ]


def miniature(folder: Path) -> list[str]:
    """Overrides for all three stages in a few steps."""
    return [
        *small_model(folder),
        *("stage.sft.batch_size=8", "stage.sft.micro_batch_size_per_gpu=2", "stage.sft.max_steps=2"),
        *("stage.rm.batch_size=8", "stage.rm.micro_batch_size_per_gpu=2", "stage.rm.max_steps=2"),
        *("stage.ppo.rollout_batch_size=8", "stage.ppo.mini_batch_size=4", "stage.ppo.micro_batch_size_per_gpu=1"),
        *("stage.ppo.iterations=2", "stage.ppo.eval_prompts=4"),
    ]
