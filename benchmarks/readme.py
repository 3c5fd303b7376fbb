"""The figures of README.md, written from benchmarks/results: `python benchmarks/readme.py` (a test compares them)."""

import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from quality import goals  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, float]


def change(name: str, digits: int = 1, unit: str = "") -> Callable[[Row], str]:
    """A cell with a figure before and after."""
    return lambda row: f"{row[f'{name} before']:.{digits}f} → {row[f'{name} after']:.{digits}f}{unit}"


def judged(row: Row) -> str:
    """The judge's share before and after."""
    return f"{row['judge positive before (%)']:.0f} → {row['judge positive after (%)']:.0f} %"


def share(name: str) -> Callable[[Row], str]:
    """A cell with a share of 1 in percent."""
    return lambda row: f"{100 * row[name]:.1f} %"


def number(name: str, digits: int = 1, unit: str = "") -> Callable[[Row], str]:
    """A cell with one figure."""
    return lambda row: f"{row[name]:.{digits}f}{unit}"


def minutes(row: Row) -> str:
    """What launch.py took."""
    return f"{row['launch.py seconds'] / 60:.1f}"


def quality(model: str) -> str:
    """The table of benchmarks/quality.py for one model."""
    content = json.loads((RESULTS / f"quality-{model}.json").read_text(encoding="utf-8"))
    rows: dict[str, Row] = content["seeds"]
    bigram = next(iter(rows.values()))["bigram perplexity"]
    against = f" (Kneser-Ney bigram: {bigram:.0f})" if model == "tiny" else ""
    lines: list[tuple[str, Callable[[Row], str]]] = [
        (f"SFT: held-out perplexity{against}", change("perplexity")),
        ("reward model: held-out accuracy", share("RM accuracy")),
        (
            "PPO: rise of the held-out score, in standard deviations of the SFT answers'",
            number("score rise in SFT standard deviations", 2),
        ),
        ("PPO: answers that the judge calls positive", judged),
        ("PPO: tokens per answer", change("length")),
        ("PPO: answers that end with EOS", number("EOS rate after (%)", 0, " %")),
        ("PPO: KL per answer in nats (budget: 15)", number("KL per sequence")),
    ]
    answers = "perplexity of the answers under the SFT model"
    if f"{answers} after" in next(iter(rows.values())):
        lines.append(("PPO: the answers' perplexity under the SFT model", change(answers, 0)))
    lines.append(("whole command, minutes", minutes))
    table = [f"| | {' | '.join(f'seed {seed}' for seed in rows)} |", "|---|" + "---:|" * len(rows)]
    table += [f"| {title} | {' | '.join(cell(row) for row in rows.values())} |" for title, cell in lines]
    met = [met for row in rows.values() for met in goals(row, model=model, kl_budget=15.0).values()]
    return "\n".join([*table, "", f"{sum(met)} of {len(met)} goals met. {source(content['facts'])}"])


def source(facts: dict[str, str]) -> str:
    """What figures were measured with."""
    commit = facts["commit"][:7] if " " not in facts["commit"] else facts["commit"]
    return f"Measured by {facts['command']} at commit {commit}: {facts['hardware']}; {facts['versions']}."


def algorithms(model: str) -> str:
    """The table of benchmarks/algorithms.py for one model: means over the seeds."""
    content = json.loads((RESULTS / f"algorithms-{model}.json").read_text(encoding="utf-8"))
    seeds: list[dict[str, Any]] = list(content["seeds"].values())
    names = {"ppo": "PPO", "grpo": "GRPO", "rloo": "RLOO", "reinforce_pp": "REINFORCE++"}
    groups: list[tuple[str, list[Row]]] = [
        (names[stage], [curves[stage][-1] for curves in seeds]) for stage in seeds[0] if stage != "best_of_n"
    ]
    for index, point in enumerate(seeds[0]["best_of_n"]):
        groups.append((f"best of {point['step']:.0f}", [curves["best_of_n"][index] for curves in seeds]))
    over = f"mean of {len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    lines = [
        f"| {over} | score | judge positive | KL per answer | tokens per answer |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, points in groups:
        score, judge, kl, length = (
            statistics.fmean(point[f"eval/{key}"] for point in points)
            for key in ("score", "judge_positive", "kl_per_sequence", "response_length")
        )
        lines.append(f"| {name} | {score:.2f} | {100 * judge:.1f} % | {kl:.2f} | {length:.1f} |")
    return "\n".join([*lines, "", source(content["facts"])])


def filled(text: str) -> str:
    """The README with the parts between `<!-- figures: KIND MODEL -->` and `<!-- end -->` written anew."""
    kinds = {"quality": quality, "algorithms": algorithms}

    def part(match: re.Match[str]) -> str:
        return f"{match[1]}\n\n{kinds[match[2]](match[3])}\n\n{match[4]}"

    return re.sub(r"(<!-- figures: (\w+) ([\w.-]+) -->).*?(<!-- end -->)", part, text, flags=re.DOTALL)


def main() -> int:
    """Rewrite README.md."""
    path = ROOT / "README.md"
    path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
