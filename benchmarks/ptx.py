"""What the pretraining mix is for: loss on held-out text after PPO with and without it, at equal score.

`python benchmarks/ptx.py [--seeds 1 2 3] [--coef 1.0]` writes benchmarks/results/ptx.md. It shares the directories of
benchmarks/algorithms.py; PPO with the mix starts from the same SFT and reward model and takes the same options.
"""

import argparse
import statistics
import sys
from pathlib import Path

from algorithms import KL, ROOT, SCORE, Point, at_score, points, run_seed
from quality import launch

TEXT = "eval/text_loss"


def row(seed: int, plain: list[Point], mixed: list[Point]) -> tuple[list[str], tuple[float, float]]:
    """A line of the table, and what the text loss rose by without and with the mix."""
    curves = (plain, mixed)
    score, start = min(max(point[SCORE] for point in curve) for curve in curves), plain[0][TEXT]
    losses_at, kls = ([at_score(curve, score, name) for curve in curves] for name in (TEXT, KL))
    if None in losses_at:
        raise SystemExit(f"seed {seed}: a run never scored better than at its start; there is nothing to compare")
    rises = (losses_at[0] - start, losses_at[1] - start)
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
        plain = run_seed(seed, [], [], options.folder.resolve())["ppo"]
        mixed = pipeline.with_name(f"seed{seed}-ptx-{options.coef:g}")
        models = (f"stage.actor_model={pipeline}/sft/model", f"stage.reward_model={pipeline}/rm/model")
        mix = (f"stage.ptx.coef={options.coef}", "stage.ptx.mode=grad_ratio")
        launch(mixed, "stage=ppo", f"seed={seed}", *models, *mix)
        cells, rise = row(seed, points(plain), points(mixed))
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
