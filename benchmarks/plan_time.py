"""How long a look takes: `mode=plan`, `mode=explain`, `--help` and `--cfg job`, as whole processes.

python benchmarks/plan_time.py [--runs 7]    writes benchmarks/results/plan_time.md
"""

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import processor

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {
    "the default": ["mode=plan"],
    "PPO of OPT-13B on 8 A100": ["stage=ppo", "model=opt13b", "hardware=8xa100", "mode=plan"],
    "a published recipe on 64 GPUs": ["experiment=dschat_opt66b_64xa100", "mode=plan"],
    "one option explained": ["mode=explain", "key=stage.ppo.kl_coef"],
    "the groups and options": ["--help"],
    "the composed configuration": ["--cfg", "job"],
}
LIMIT = 1.5


def seconds(arguments: list[str], folder: str) -> float:
    """Wall-clock seconds of one call of launch.py, which must succeed."""
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), *arguments], cwd=folder, check=True, stdout=subprocess.DEVNULL
    )
    return time.perf_counter() - started


def main() -> int:
    """Measure each command in turn, so that all of them see the machine's slow moments; exit code 1 over the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(runs + 1):
            for name, arguments in COMMANDS.items():
                taken = seconds(arguments, folder)
                if number:  # The first round warms the file cache.
                    times[name].append(taken)
    lines = [
        f"- command: `python benchmarks/plan_time.py --runs {runs}`, whole processes, after one warm-up",
        f"- hardware: {processor()}, Python {platform.python_version()}",
        "",
        "| | median s | min | max |",
        "|---|---:|---:|---:|",
        *(
            f"| {name}: `launch.py {' '.join(COMMANDS[name])}` | {statistics.median(taken):.2f} | {min(taken):.2f} | "
            f"{max(taken):.2f} |"
            for name, taken in times.items()
        ),
        "",
    ]
    text = "\n".join(lines)
    (ROOT / "benchmarks" / "results" / "plan_time.md").write_text(text, encoding="utf-8")
    print(text)
    return 0 if all(statistics.median(taken) < LIMIT for taken in times.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
