"""Does the default learn? Runs the pipeline for several seeds and holds the results against stated goals.

`python benchmarks/quality.py [--seeds 1 2 3] [overrides …]` writes benchmarks/results/quality.md and quality.json. Each
seed is a full `python launch.py seed=N` in a directory of its own; finished ones are read, not run again.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def run_seed(seed: int, overrides: list[str], folder: Path) -> Path:
    """Train with one seed unless that is done already; return the run directory."""
    run_dir = folder / f"seed{seed}"
    if not (run_dir / "ppo" / "summary.json").is_file():
        started = time.time()
        command = [sys.executable, str(ROOT / "launch.py"), f"seed={seed}", f"run_dir={run_dir}", *overrides]
        subprocess.run(command, check=True, cwd=ROOT)
        (run_dir / "wall_seconds").write_text(f"{time.time() - started:.0f}", encoding="utf-8")
    return run_dir


def bigram_perplexity(overrides: list[str]) -> float:
    """Perplexity of the Kneser-Ney bigram model on the same held-out text."""
    command = [sys.executable, str(ROOT / "benchmarks" / "bigram.py"), *overrides]
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    return float(json.loads(done.stdout)["perplexity"])


def figures(run_dir: Path, bigram: float) -> dict[str, float]:
    """The numbers of one run."""
    sft, rm, ppo = (json.loads((run_dir / name / "summary.json").read_text()) for name in ("sft", "rm", "ppo"))
    before, after = ppo["before"], ppo["after"]
    return {
        "perplexity before": sft["before"]["eval/perplexity"],
        "perplexity after": sft["after"]["eval/perplexity"],
        "bigram perplexity": bigram,
        "RM accuracy": rm["after"]["eval/accuracy"],
        "score before": before["eval/score"],
        "score after": after["eval/score"],
        "score rise in SFT standard deviations": (after["eval/score"] - before["eval/score"])
        / before["eval/score_std"],
        "judge positive before (%)": 100 * before["eval/judge_positive"],
        "judge positive after (%)": 100 * after["eval/judge_positive"],
        "length before": before["eval/response_length"],
        "length after": after["eval/response_length"],
        "length change (%)": 100 * (after["eval/response_length"] / before["eval/response_length"] - 1),
        "EOS rate after (%)": 100 * after["eval/eos_rate"],
        "KL per sequence": after["eval/kl_per_sequence"],
        "training seconds": sft["seconds"] + rm["seconds"] + ppo["seconds"],
        "launch.py seconds": float((run_dir / "wall_seconds").read_text()),
    }


def goals(row: dict[str, float], kl_budget: float) -> dict[str, bool]:
    """What has to hold for every seed."""
    return {
        "perplexity falls at least tenfold": row["perplexity before"] >= 10 * row["perplexity after"],
        "perplexity beats the bigram model": row["perplexity after"] < row["bigram perplexity"],
        "RM accuracy at least 0.68": row["RM accuracy"] >= 0.68,
        "score rises by at least 1.0 SFT standard deviation": row["score rise in SFT standard deviations"] >= 1.0,
        "judge's positive share rises by at least 15 points": (
            row["judge positive after (%)"] - row["judge positive before (%)"] >= 15
        ),
        "length stays within 40 %": abs(row["length change (%)"]) <= 40,
        "at least 80 % end with EOS": row["EOS rate after (%)"] >= 80,
        f"KL per sequence under the budget of {kl_budget:g} nats": row["KL per sequence"] < kl_budget,
    }


def table(rows: dict[int, dict[str, float]], kl_budget: float, facts: dict[str, Any]) -> str:
    """The results as Markdown."""
    seeds = list(rows)
    head = ["| | " + " | ".join(f"seed {seed}" for seed in seeds) + " |", "|---|" + "---:|" * len(seeds)]
    names = list(rows[seeds[0]])
    body = [f"| {name} | " + " | ".join(f"{rows[seed][name]:.3g}" for seed in seeds) + " |" for name in names]
    verdicts = {seed: goals(rows[seed], kl_budget) for seed in seeds}
    checks = [
        f"| {goal} | " + " | ".join("yes" if verdicts[seed][goal] else "**no**" for seed in seeds) + " |"
        for goal in verdicts[seeds[0]]
    ]
    notes = [f"{name}: {value}" for name, value in facts.items()]
    return "\n".join(["\n".join(f"- {note}" for note in notes), "", *head, *body, *checks, ""])


def main() -> int:
    """Run, collect, judge; exit code 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "quality")
    parser.add_argument("overrides", nargs="*", help="configuration overrides as for launch.py")
    options = parser.parse_args()
    bigram = bigram_perplexity(options.overrides)
    directories = {seed: run_seed(seed, options.overrides, options.folder.resolve()) for seed in options.seeds}
    rows = {seed: figures(directory, bigram) for seed, directory in directories.items()}
    first = directories[options.seeds[0]]
    summary = json.loads((first / "ppo" / "summary.json").read_text())
    kl_budget = float(
        next(
            line.split(":")[1]
            for line in (first / "ppo" / "config.yaml").read_text().splitlines()
            if "kl_budget" in line
        )
    )
    facts = {
        "command": "`python benchmarks/quality.py " + " ".join(sys.argv[1:]) + "`",
        "commit": summary["git_commit"],
        "versions": ", ".join(f"{name} {version}" for name, version in summary["versions"].items()),
        "hardware": f"{os.cpu_count()} CPU cores ({platform.machine()})",
        "ranks and precision": f"{summary['ranks']}, {summary['precision']}",
    }
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    (results / "quality.json").write_text(json.dumps({"facts": facts, "seeds": rows}, indent=1), encoding="utf-8")
    text = table(rows, kl_budget, facts)
    (results / "quality.md").write_text(text, encoding="utf-8")
    print(text)
    return 0 if all(all(goals(row, kl_budget).values()) for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
