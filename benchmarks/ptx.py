"""What the pretraining mix is for: loss on held-out text after PPO with and without it, at equal score.

`python benchmarks/ptx.py [--seeds 1 2 3] [--coef 1.0]` writes benchmarks/results/ptx.md. It shares the directories of
benchmarks/algorithms.py; PPO with the mix starts from the same SFT and reward model and takes the same options.
"""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from algorithms import ROOT, SCORE, launch, run_seed

TEXT = "eval/text_loss"
Curve = list[dict[str, float]]


def curve_of(run_dir: Path) -> Curve:
    """Score, text loss and KL of each evaluation."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if SCORE in row]


def at_score(curve: Sequence[dict[str, float]], score: float, name: str) -> float:
    """A metric where the curve first reaches a score, on the line between its evaluations."""
    for before, after in itertools.pairwise(curve):
        if after[SCORE] >= score:
            rise = after[SCORE] - before[SCORE]
            part = min(1.0, max(0.0, (score - before[SCORE]) / rise)) if rise > 0 else 1.0
            return before[name] + part * (after[name] - before[name])
    return curve[-1][name]


def row(seed: int, plain: Curve, mixed: Curve) -> tuple[list[str], tuple[float, float]]:
    """A line of the table, and what the text loss rose by without and with the mix."""
    score = min(max(point[SCORE] for point in curve) for curve in (plain, mixed))
    start = plain[0][TEXT]
    rises = (at_score(plain, score, TEXT) - start, at_score(mixed, score, TEXT) - start)
    kls = [at_score(curve, score, "eval/kl_per_sequence") for curve in (plain, mixed)]
    losses = [f"{start:.3f}", f"{start + rises[0]:.3f}", f"{start + rises[1]:.3f}"]
    finals = [f"{plain[-1][SCORE]:.2f}", f"{mixed[-1][SCORE]:.2f}"]
    return [str(seed), f"{score:.2f}", *losses, *(f"{kl:.1f}" for kl in kls), *finals], rises


def main() -> int:
    """Run, compare, write; exit code 1 if the mix keeps less of the text than PPO alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--coef", type=float, default=1.0, help="norm of the text's gradient relative to the policy's")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "quality-tiny")
    options = parser.parse_args()
    rows, rises = [], []
    for seed in options.seeds:
        pipeline = options.folder.resolve() / f"seed{seed}"
        plain = run_seed(seed, ["ppo"], [], options.folder.resolve())["ppo"]
        mixed = pipeline.with_name(f"seed{seed}-ptx-{options.coef:g}")
        models = (f"stage.actor_model={pipeline}/sft/model", f"stage.reward_model={pipeline}/rm/model")
        mix = (f"stage.ptx.coef={options.coef}", "stage.ptx.mode=grad_ratio")
        launch(mixed, "stage=ppo", f"seed={seed}", *models, *mix)
        cells, rise = row(seed, curve_of(plain), curve_of(mixed))
        rows.append(cells)
        rises.append(rise)
    head = ["seed", "score", "text loss of the SFT model", "PPO", "PPO with the mix", "KL", "KL with the mix"]
    head += ["last score", "last score with the mix"]
    lines = [
        f"- command: `python benchmarks/ptx.py {' '.join(sys.argv[1:])}".rstrip() + "`",
        "- at the highest score that both runs reached; loss on held-out text in nats per token",
        "",
        f"| {' | '.join(head)} |",
        "|" + "---:|" * len(head),
        *(f"| {' | '.join(cells)} |" for cells in rows),
        "",
        "PPO alone raises the loss on text by {:.3f} nats per token, with the mix by {:.3f}.".format(
            *(statistics.fmean(side) for side in zip(*rises, strict=True))
        ),
        "",
    ]
    text = "\n".join(lines)
    (ROOT / "benchmarks" / "results" / "ptx.md").write_text(text, encoding="utf-8")
    print(text)
    return 0 if all(mixed < plain for plain, mixed in rises) else 1


if __name__ == "__main__":
    sys.exit(main())
