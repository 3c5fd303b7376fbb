"""PPO, GRPO, RLOO and best-of-n from the same SFT and reward model: score and judge against KL.

`python benchmarks/algorithms.py [--model tiny] [--seeds 1 2 3] [--stages grpo rloo] [overrides …]` writes
benchmarks/results/algorithms-MODEL.md, .json and .png. The SFT and the reward model of a seed, and its PPO, are those
of benchmarks/quality.py, whose directories it shares; each other algorithm is a run of its own. Finished runs are read.
"""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from machine import processor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from quality import MODELS, launch  # noqa: E402

KL, SCORE, JUDGE = "eval/kl_per_sequence", "eval/score", "eval/judge_positive"
BEST = "best_of_n"
# Okabe and Ito's palette.
COLOURS = {"ppo": "#0072B2", "grpo": "#009E73", "rloo": "#E69F00", "reinforce_pp": "#CC79A7", BEST: "#4b5563"}
NAMES = {"ppo": "PPO", "grpo": "GRPO", "rloo": "RLOO", "reinforce_pp": "REINFORCE++", BEST: "best of n"}
Point = dict[str, float]


def run_seed(seed: int, stages: Sequence[str], overrides: Sequence[str], folder: Path) -> dict[str, Path]:
    """All runs of a seed: the directory of each algorithm."""
    pipeline = folder / f"seed{seed}"
    launch(pipeline, f"seed={seed}", *overrides, made="ppo/summary.json")
    models = (f"stage.actor_model={pipeline}/sft/model", f"stage.reward_model={pipeline}/rm/model")
    common = [override for override in overrides if not override.startswith("stage.")]
    found = {stage: folder / f"seed{seed}-{stage}" for stage in (*stages, BEST)}
    for stage, run_dir in found.items():
        launch(run_dir, f"stage={stage}", f"seed={seed}", *models, *common)
    return {"ppo": pipeline / "ppo", **found}


def points(run_dir: Path) -> list[Point]:
    """What was evaluated, in order of the iterations or numbers of answers ("step")."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = [{name: row[name] for name in row if name == "step" or name.startswith("eval/")} for row in rows]
    return [row for row in kept if SCORE in row]


def at_score(curve: Sequence[Point], score: float, name: str) -> float | None:
    """A metric where a curve first reaches a score, on the line between its evaluations; None if it never does."""
    for before, after in itertools.pairwise(curve):
        if after[SCORE] >= score:
            rise = after[SCORE] - before[SCORE]
            share = min(1.0, max(0.0, (score - before[SCORE]) / rise)) if rise > 0 else 1.0
            return before[name] + share * (after[name] - before[name])
    return None


def of_n(curve: Sequence[Point], n: int) -> Point | None:
    """The point of the best of n answers."""
    return next((point for point in curve if point["step"] == n), None)


def seed_rows(seed: int, curves: dict[str, list[Point]]) -> list[list[str]]:
    """The lines of the table for one seed."""
    eight = of_n(curves[BEST], 8)
    rows = []
    for stage, curve in curves.items():
        shown = curve if stage == BEST else curve[-1:]
        for point in shown:
            name = f"best of {point['step']:.0f}" if stage == BEST else NAMES[stage]
            reach = at_score(curve, eight[SCORE], KL) if eight is not None and stage != BEST else None
            needed = "" if stage == BEST else "not reached" if reach is None else f"{reach:.1f}"
            numbers = [f"{point[SCORE]:.2f}", f"{100 * point[JUDGE]:.1f}", f"{point[KL]:.2f}"]
            lengths = [f"{point['eval/response_length']:.1f}", f"{100 * point['eval/eos_rate']:.0f}"]
            rows.append([str(seed), name, *numbers, *lengths, needed])
    return rows


def verdicts(curves: dict[str, list[Point]]) -> dict[str, bool]:
    """What has to hold for a seed."""
    eight, last = of_n(curves[BEST], 8), curves["ppo"][-1]
    assert eight is not None, "stage.n needs 8"
    return {
        "PPO reaches best-of-8's mean score": last[SCORE] >= eight[SCORE],
        "judge's share within 3 points of best-of-8's, or above": last[JUDGE] >= eight[JUDGE] - 0.03,
    }


def draw(results: dict[int, dict[str, list[Point]]], target: Path) -> None:
    """Two panels, each algorithm a colour: seeds thin, and a thick line through the means of equal evaluations."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), dpi=150, layout="constrained")
    stages = list(next(iter(results.values())))
    for axis, (name, factor, title) in zip(
        axes, ((SCORE, 1, "Held-out score"), (JUDGE, 100, "Called positive by the judge, %")), strict=True
    ):
        for stage in stages:
            curves = [curves[stage] for curves in results.values()]
            for curve in curves:
                axis.plot(
                    [point[KL] for point in curve],
                    [factor * point[name] for point in curve],
                    color=COLOURS[stage],
                    alpha=0.3,
                    linewidth=0.8,
                )
            means = [
                [statistics.fmean(point[key] for point in together) for key in (KL, name)]
                for together in zip(*curves, strict=False)
            ]
            axis.plot(
                [mean[0] for mean in means],
                [factor * mean[1] for mean in means],
                color=COLOURS[stage],
                linewidth=2,
                marker="o",
                markersize=3.5,
                linestyle="--" if stage == BEST else "-",
                label=NAMES[stage],
            )
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("KL to the SFT model, nats per response")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2)
    axes[0].legend(frameon=False)
    figure.savefig(target)


def facts_of(found: dict[str, Path], reward_model: Path) -> dict[str, str]:
    """What the figures of a seed were measured with."""
    summaries = {
        stage: json.loads((path / "summary.json").read_text(encoding="utf-8")) for stage, path in found.items()
    }
    earlier = json.loads((reward_model / "summary.json").read_text(encoding="utf-8"))
    commits = [f"{NAMES[stage]} {summary['git_commit'][:7]}" for stage, summary in summaries.items()]
    summary = summaries["ppo"]
    return {
        "command": f"`python benchmarks/algorithms.py {' '.join(sys.argv[1:])}".rstrip() + "`",
        "commit": ", ".join([*commits, f"SFT and reward models {earlier['git_commit'][:7]}"]),
        "versions": ", ".join(f"{name} {version}" for name, version in summary["versions"].items()),
        "hardware": f"{processor()}, {summary['ranks']} ranks, {summary['precision']}",
    }


def report(results: dict[int, dict[str, list[Point]]], facts: dict[str, str]) -> str:
    """The results as Markdown."""
    head = ["seed", "", "score", "judge positive (%)", "KL", "length", "EOS (%)", "KL at best-of-8's score"]
    lines = [*(f"- {name}: {value}" for name, value in facts.items()), ""]
    lines += [f"| {' | '.join(head)} |", "|---|---|" + "---:|" * (len(head) - 2)]
    lines += [f"| {' | '.join(row)} |" for seed, curves in results.items() for row in seed_rows(seed, curves)]
    lines.append("")
    for seed, curves in results.items():
        lines += [f"- seed {seed}: {goal}: {'yes' if met else '**no**'}" for goal, met in verdicts(curves).items()]
    return "\n".join([*lines, ""])


def main() -> int:
    """Run, collect, draw; exit code 1 if PPO falls behind best-of-8."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--stages", nargs="+", default=["grpo", "rloo"], help="beside PPO")
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--folder", type=Path, help="where the runs are: runs/quality-MODEL")
    parser.add_argument("overrides", nargs="*", help="configuration overrides as for launch.py")
    options = parser.parse_args()
    folder = (options.folder or ROOT / "runs" / f"quality-{options.model}").resolve()
    overrides = [*MODELS[options.model], *options.overrides]
    runs = {seed: run_seed(seed, options.stages, overrides, folder) for seed in options.seeds}
    results = {seed: {stage: points(path) for stage, path in found.items()} for seed, found in runs.items()}
    facts = facts_of(next(iter(runs.values())), folder / f"seed{options.seeds[0]}" / "rm")
    target = ROOT / "benchmarks" / "results" / f"algorithms-{options.model}"
    draw(results, target.with_suffix(".png"))
    content: dict[str, Any] = {"facts": facts, "seeds": results}
    target.with_suffix(".json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    text = report(results, facts)
    target.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    return 0 if all(all(verdicts(curves).values()) for curves in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
