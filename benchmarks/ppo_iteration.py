"""What a PPO iteration spends its time on, with each way to generate.

`python benchmarks/ppo_iteration.py [--model tiny] [--iterations 6] [--turns 3]` writes
benchmarks/results/ppo_iteration-MODEL.md. The runs start from the SFT and the reward model of a run of
benchmarks/quality.py; all answers have the same length, so that the ways do the same work. The ways take turns.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from machine import processor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from quality import MODELS, launch  # noqa: E402

PHASES = ("generation", "scoring", "training")
WAYS = ("hf", "auto")


def phases(run_dir: Path, iterations: int) -> dict[str, float]:
    """Seconds of an iteration's phases, the mean of a run."""
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    return {name: summary["phases"][name] / iterations for name in PHASES}


def report(found: dict[str, list[dict[str, float]]], first: Path, *, length: int, iterations: int) -> str:
    """The results as Markdown."""
    summary = json.loads((first / "summary.json").read_text(encoding="utf-8"))
    stage = (first / "config.yaml").read_text(encoding="utf-8").splitlines()
    batch = int(next(line.split(":")[1] for line in stage if line.strip().startswith("rollout_batch_size")))
    hardware = f"{processor()}"
    lines = [
        f"- command: `python benchmarks/ppo_iteration.py {' '.join(sys.argv[1:])}`",
        f"- commit: {summary['git_commit']}",
        f"- versions: {', '.join(f'{name} {version}' for name, version in summary['versions'].items())}",
        f"- hardware: {hardware}, {summary['ranks']} ranks, {summary['precision']}",
        f"- {batch} answers of {length} tokens in an iteration; medians of {len(found[WAYS[0]])} runs of "
        f"{iterations} iterations",
        "",
        "| rollout | " + " | ".join(f"{name} s" for name in PHASES) + " | share of generation | samples/s |",
        "|---|" + "---:|" * (len(PHASES) + 2),
    ]
    for way, rows in found.items():
        median = {name: statistics.median(row[name] for row in rows) for name in PHASES}
        total = sum(median.values())
        numbers = " | ".join(f"{median[name]:.2f}" for name in PHASES)
        lines.append(f"| {way} | {numbers} | {100 * median['generation'] / total:.0f} % | {batch / total:.1f} |")
    return "\n".join([*lines, ""])


def main() -> int:
    """Run, collect, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--run", type=Path, help="with sft/ and rm/: runs/quality-MODEL/seed1")
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the runs are: runs/ppo_iteration-MODEL")
    options = parser.parse_args()
    run = (options.run or ROOT / "runs" / f"quality-{options.model}" / "seed1").resolve()
    folder = (options.folder or ROOT / "runs" / f"ppo_iteration-{options.model}").resolve()
    length = 64 if options.model == "smollm2-135m" else 48
    common = [
        *MODELS[options.model],
        "stage=ppo",
        f"stage.actor_model={run}/sft/model",
        f"stage.reward_model={run}/rm/model",
        f"stage.iterations={options.iterations}",
        f"stage.eval_every={options.iterations}",
        "stage.eval_prompts=8",
        f"rollout.max_new_tokens={length}",
        f"rollout.min_new_tokens={length}",
    ]
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for turn in range(options.turns):
        for way in WAYS:
            run_dir = launch(folder / f"{way}-{turn}", *common, f"rollout={way}")
            found[way].append(phases(run_dir, options.iterations))
    text = report(found, folder / f"{WAYS[0]}-0", length=length, iterations=options.iterations)
    (ROOT / "benchmarks" / "results" / f"ppo_iteration-{options.model}.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
