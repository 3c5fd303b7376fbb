"""Run directories that look like those of real runs, for the tests of plots and reports."""

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

from rlhf.tracking.records import append_row, write_json

REVIEWS = [
    ("Continue this film review: it's a", "a joyless thing that never lands .", "a joyful, warm and honest film ."),
    ("Continue this film review: the film", "is a mess, and long .", "is a small wonder, quietly moving ."),
    ("Continue this film review: an utterly", "forgettable 90 minutes", "charming and funny little picture ."),
]


def _summary(stage: str, before: dict[str, float], after: dict[str, float], phases: dict[str, float]) -> dict[str, Any]:
    return {
        "stage": stage,
        "started": "2026-03-01T10:00:00+00:00",
        "seconds": sum(phases.values()) + 3.0,
        "phases": phases,
        "before": before,
        "after": after,
        "data": {"fingerprint": "5f0c1b2a9d3e", "counts": {stage: {"train": 1840, "held_out": 97}}},
        "versions": {"torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.19.1"},
        "git_commit": "793f84d9f0c1b2a9d3e5f0c1b2a9d3e5f0c1b2a9",
        "ranks": 2,
        "device": "cpu",
        "precision": "bf16",
    }


def _config(stage: dict[str, Any]) -> dict[str, Any]:
    return {
        "stage": stage,
        "model": {"name": "tiny", "source": "scratch", "scratch": {"vocab_size": 4096, "num_layers": 4}},
        "data": {"name": "film_reviews", "max_prompt_length": 32, "max_response_length": 48},
        "hardware": {"name": "local", "accelerator": "cpu", "gpus_per_node": 2, "threads_per_rank": 1},
        "memory": {"zero_stage": 1, "precision": "bf16"},
        "seed": 1,
    }


def _write(directory: Path, config: dict[str, Any], metrics: list[dict[str, Any]]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (directory / "command.txt").write_text(f"deepspeed --module rlhf --config {directory.name}/config.yaml\n")
    for row in metrics:
        append_row(directory / "metrics.jsonl", row)


def _finish(directory: Path, summary: dict[str, Any]) -> None:
    write_json(directory / "summary.json", summary)
    (directory / "model").mkdir()
    (directory / "model" / "config.json").write_text(json.dumps({"architectures": ["OPTForCausalLM"]}))


def write_sft(directory: Path, *, steps: int = 200) -> None:
    """A finished fine-tuning run."""
    noise = random.Random(1)
    rows: list[dict[str, Any]] = []
    for step in range(0, steps + 1, 5):
        loss = 4.1 + 4.3 * math.exp(-step / 30)
        row = {"stage": "sft", "step": step, "time": 0.0, "train/loss": loss + noise.gauss(0, 0.12)}
        if step % 50 == 0:
            row |= {"eval/loss": loss, "eval/perplexity": math.exp(loss)}
        rows.append(row)
    _write(directory, _config({"name": "sft", "batch_size": 64, "epochs": 1.0}), rows)
    before, after = {"eval/loss": 8.4, "eval/perplexity": 4447.1}, {"eval/loss": 4.1, "eval/perplexity": 60.6}
    _finish(directory, _summary("sft", before, after, {"training": 98.2, "evaluation": 6.4}))


def write_rm(directory: Path, *, steps: int = 140) -> None:
    """A finished reward-model run."""
    noise = random.Random(2)
    rows: list[dict[str, Any]] = []
    for step in range(0, steps + 1, 2):
        gain = 1 - math.exp(-step / 45)
        row = {
            "stage": "rm",
            "step": step,
            "time": 0.0,
            "train/loss": 0.69 - 0.17 * gain + noise.gauss(0, 0.04),
            "train/accuracy": min(1.0, 0.5 + 0.24 * gain + noise.gauss(0, 0.06)),
            "train/margin": 1.1 * gain + noise.gauss(0, 0.1),
        }
        if step % 35 < 2 or step == steps:
            row |= {"eval/loss": 0.69 - 0.14 * gain, "eval/accuracy": 0.5 + 0.21 * gain, "eval/margin": 1.0 * gain}
        rows.append(row)
    _write(directory, _config({"name": "rm", "batch_size": 32}), rows)
    for prompt, rejected, chosen in REVIEWS:
        responses = {
            "chosen": {"text": chosen, "score": 1.2, "tokens": 9, "ended": True},
            "rejected": {"text": rejected, "score": -0.8, "tokens": 8, "ended": True},
        }
        append_row(
            directory / "samples.jsonl", {"stage": "rm", "step": steps, "prompt": prompt, "responses": responses}
        )
    before = {"eval/accuracy": 0.497, "eval/loss": 0.694, "eval/margin": -0.003}
    after = {"eval/accuracy": 0.712, "eval/loss": 0.561, "eval/margin": 0.95}
    _finish(directory, _summary("rm", before, after, {"training": 51.0, "evaluation": 4.1}))


def write_ppo(directory: Path, *, iterations: int = 60, text: str | None = None) -> None:
    """A finished PPO run; `text` is answered to the first prompt."""
    noise = random.Random(3)
    rows: list[dict[str, Any]] = []
    for step in range(iterations + 1):
        gain = 1 - math.exp(-step / 22)
        row = {
            "stage": "ppo",
            "step": step,
            "time": 0.0,
            "rollout/score": -0.1 + 1.6 * gain + noise.gauss(0, 0.12),
            "rollout/kl_per_sequence": 9.0 * gain + noise.gauss(0, 0.4),
            "rollout/response_length": 19 - 2 * gain + noise.gauss(0, 0.7),
            "rollout/eos_rate": min(1.0, 0.95 + noise.gauss(0, 0.02)),
            "actor/loss": -0.02 + noise.gauss(0, 0.01),
            "critic/loss": 0.08 + 0.3 * (1 - gain) + noise.gauss(0, 0.02),
            "actor/clip_fraction": abs(0.05 + 0.05 * gain + noise.gauss(0, 0.01)),
            "actor/entropy": 4.2 - 1.1 * gain + noise.gauss(0, 0.05),
        }
        if step % 20 == 0:
            row |= {
                "eval/score": -0.05 + 1.5 * gain,
                "eval/kl_per_sequence": 8.7 * gain,
                "eval/response_length": 19 - 2 * gain,
            }
            row |= {"eval/eos_rate": 0.95, "eval/judge_positive": 0.48 + 0.3 * gain}
        rows.append(row)
    _write(directory, _config({"name": "ppo", "kl_coef": 0.05, "iterations": iterations}), rows)
    for index in range(12):
        prompt, sft, ppo = REVIEWS[index % len(REVIEWS)]
        ppo_text = text if text is not None and index == 0 else ppo
        responses = {
            "sft": {"text": sft, "score": -0.4 - index / 20, "tokens": 9, "ended": True},
            "ppo": {"text": ppo_text, "score": 1.3 + index / 20, "tokens": 11, "ended": index % 5 != 4},
        }
        row = {"stage": "ppo", "step": iterations, "prompt": f"{prompt} [{index}]", "responses": responses}
        append_row(directory / "samples.jsonl", row)
    before = {
        "eval/score": -0.05,
        "eval/score_std": 0.98,
        "eval/kl_per_sequence": 0.0,
        "eval/response_length": 19.0,
        "eval/eos_rate": 0.95,
    }
    after = {
        "eval/score": 1.35,
        "eval/score_std": 0.71,
        "eval/kl_per_sequence": 8.1,
        "eval/response_length": 17.2,
        "eval/eos_rate": 0.953,
    }
    before["eval/judge_positive"], after["eval/judge_positive"] = 0.484, 0.763
    phases = {"generation": 88.0, "scoring": 30.5, "training": 64.0, "evaluation": 12.0, "export": 0.4}
    _finish(directory, _summary("ppo", before, after, phases))


def write_pipeline(directory: Path, *, text: str | None = None) -> None:
    """A finished pipeline."""
    stage = {"name": "pipeline", "sft": {"name": "sft", "batch_size": 64}, "rm": {"batch_size": 32}, "ppo": {}}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(_config(stage), sort_keys=False))
    write_sft(directory / "sft")
    write_rm(directory / "rm")
    write_ppo(directory / "ppo", text=text)
