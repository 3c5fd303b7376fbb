"""Does a model learn? Runs the pipeline for several seeds and holds the results against stated goals.

`python benchmarks/quality.py [--model tiny] [--seeds 1 2 3] [overrides …]` writes
benchmarks/results/quality-MODEL.md and .json. Each seed is a full `python launch.py seed=N` in a directory of its own;
finished ones are read, not run again.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import processor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
MODELS = {"tiny": ["model=tiny"], "smollm2-135m": ["model=smollm2-135m", "lora=r8"]}


def launch(run_dir: Path, *overrides: str, made: str = "summary.json") -> Path:
    """Run launch.py unless `made` is there already; its whole time is kept beside the run. Return the run directory."""
    if not (run_dir / made).is_file():
        started = time.time()
        # Nothing is taken over from other runs: the whole time is measured.
        command = [sys.executable, str(ROOT / "launch.py"), f"run_dir={run_dir}", "reuse=off", *overrides]
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
        "perplexity of the answers under the SFT model before": before["eval/reference_perplexity"],
        "perplexity of the answers under the SFT model after": after["eval/reference_perplexity"],
        "loss on held-out text before": before["eval/text_loss"],
        "loss on held-out text after": after["eval/text_loss"],
        "KL per sequence": after["eval/kl_per_sequence"],
        **{f"{name} seconds": stage["seconds"] for name, stage in (("SFT", sft), ("RM", rm), ("PPO", ppo))},
        "training seconds": sft["seconds"] + rm["seconds"] + ppo["seconds"],
        "launch.py seconds": float((run_dir / "wall_seconds").read_text()),
    }


def goals(row: dict[str, float], *, model: str, kl_budget: float) -> dict[str, bool]:
    """What has to hold for every seed."""
    judge_rise = row["judge positive after (%)"] - row["judge positive before (%)"]
    always = {
        "score rises by at least 1.0 SFT standard deviation": row["score rise in SFT standard deviations"] >= 1.0,
        "length stays within 40 %": abs(row["length change (%)"]) <= 40,
        "at least 80 % end with EOS": row["EOS rate after (%)"] >= 80,
        f"KL per sequence under the budget of {kl_budget:g} nats": row["KL per sequence"] < kl_budget,
    }
    if model == "tiny":
        return {
            "perplexity falls at least tenfold": row["perplexity before"] >= 10 * row["perplexity after"],
            "perplexity beats the bigram model": row["perplexity after"] < row["bigram perplexity"],
            "RM accuracy at least 0.68": row["RM accuracy"] >= 0.68,
            "judge's positive share rises by at least 15 points": judge_rise >= 15,
            **always,
        }
    perplexity = "perplexity of the answers under the SFT model"
    return {
        "RM accuracy at least 0.80": row["RM accuracy"] >= 0.80,
        "judge's positive share rises by at least 25 points": judge_rise >= 25,
        "answers stay fluent: perplexity at most twice the start": row[f"{perplexity} after"]
        <= 2 * row[f"{perplexity} before"],
        "launch.py takes at most 60 minutes": row["launch.py seconds"] <= 3600,
        **always,
    }


def table(rows: dict[int, dict[str, float]], verdicts: dict[int, dict[str, bool]], facts: dict[str, Any]) -> str:
    """The results as Markdown."""
    seeds = list(rows)
    head = ["| | " + " | ".join(f"seed {seed}" for seed in seeds) + " |", "|---|" + "---:|" * len(seeds)]
    names = list(rows[seeds[0]])
    body = [f"| {name} | " + " | ".join(f"{rows[seed][name]:.3g}" for seed in seeds) + " |" for name in names]
    checks = [
        f"| {goal} | " + " | ".join("yes" if verdicts[seed][goal] else "**no**" for seed in seeds) + " |"
        for goal in verdicts[seeds[0]]
    ]
    notes = [f"{name}: {value}" for name, value in facts.items()]
    return "\n".join(["\n".join(f"- {note}" for note in notes), "", *head, *body, *checks, ""])


def main() -> int:
    """Run, collect, judge; exit code 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--folder", type=Path, help="where the runs are: runs/quality-MODEL")
    parser.add_argument("overrides", nargs="*", help="configuration overrides as for launch.py")
    options = parser.parse_args()
    folder = (options.folder or ROOT / "runs" / f"quality-{options.model}").resolve()
    overrides = [*MODELS[options.model], *options.overrides]
    bigram = bigram_perplexity(overrides)
    directories = {
        seed: launch(folder / f"seed{seed}", f"seed={seed}", *overrides, made="ppo/summary.json")
        for seed in options.seeds
    }
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
        "hardware": f"{processor()}",
        "ranks and precision": f"{summary['ranks']}, {summary['precision']}",
    }
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    verdicts = {seed: goals(row, model=options.model, kl_budget=kl_budget) for seed, row in rows.items()}
    content = {"facts": facts, "seeds": rows}
    target = results / f"quality-{options.model}.json"
    target.write_text(json.dumps(content, indent=1), encoding="utf-8")
    text = table(rows, verdicts, facts)
    target.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    return 0 if all(all(met.values()) for met in verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
