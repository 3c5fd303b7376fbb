"""The whole pipeline in miniature, as a user starts it: launch.py, the real launcher, two ranks, three stages."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from miniature import launch, launch_all, small_model
from shared_memory import left_by
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

pytestmark = pytest.mark.processes

Finished = tuple[Path, list[str], subprocess.CompletedProcess[str]]


def test_it_succeeds_and_says_where_everything_is(finished: Finished) -> None:
    run_dir, _, done = finished
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{run_dir / 'ppo' / 'model'}" in done.stdout
    assert "python -m rlhf.chat" in done.stdout
    for name in ("config.yaml", "command.txt", "metrics.jsonl", "samples.jsonl", "report.md", "report.html"):
        assert (run_dir / name).stat().st_size > 0, name
    assert len(list((run_dir / "ppo" / "plots").glob("*.png"))) > 0


def test_metrics_are_numbers_of_all_three_stages(finished: Finished) -> None:
    rows = [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows} == {"sft", "rm", "ppo"}
    ratios = [row["actor/first_ratio_error"] for row in rows if "actor/first_ratio_error" in row]
    assert len(ratios) == 2
    assert max(ratios) < 0.05
    assert all(row["time/tokens_per_second"] < 1e7 for row in rows if "time/tokens_per_second" in row)


def test_plain_transformers_loads_the_models(finished: Finished) -> None:
    run_dir = finished[0]
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "ppo" / "model")
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Tell me."}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    for stage in ("sft", "ppo"):
        model = AutoModelForCausalLM.from_pretrained(run_dir / stage / "model")
        assert torch.isfinite(model(ids).logits).all()
    reward = AutoModelForSequenceClassification.from_pretrained(run_dir / "rm" / "model", dtype=torch.float32)
    assert reward.config.num_labels == 1
    assert reward.config.score_std > 0
    sample = next(
        json.loads(line) for line in (run_dir / "rm" / "samples.jsonl").read_text().splitlines() if line.strip()
    )
    text = tokenizer.apply_chat_template([{"role": "user", "content": sample["prompt"]}], tokenize=False)
    text += f"<|assistant|>{sample['responses']['chosen']['text']}</s>"
    score = reward(tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]).logits[0, 0].detach()
    assert abs(float(score) - sample["responses"]["chosen"]["score"]) < 0.05  # bf16 in training, fp32 here


def test_others_may_read_what_the_umask_lets_them(finished: Finished) -> None:
    probe = finished[0].parent / "probe"
    probe.mkdir()
    allowed = probe.stat().st_mode & 0o777
    paths = [path for stage in ("sft", "rm", "ppo") for path in (finished[0] / stage / "model").glob("**/*")]
    assert len(paths) > 9
    assert {path.stat().st_mode & 0o777 for path in paths} == {allowed & 0o666}
    assert (finished[0] / "ppo" / "model").stat().st_mode & 0o777 == allowed


def test_the_same_command_again_names_the_finished_run(finished: Finished) -> None:
    run_dir, arguments, _ = finished
    again = launch(*arguments, f"run_dir={run_dir}")
    assert again.returncode == 2
    assert str(run_dir) in again.stderr
    assert "Traceback" not in again.stderr


SCORER = "def score(prompts, responses, **columns):\n    return [float(len(text)) for text in responses]\n"


@pytest.fixture(scope="module")
def variants(finished: Finished) -> dict[str, subprocess.CompletedProcess[str]]:
    """GRPO that a health rule stops, best-of-n and DPO from the pipeline's models; the last two on one rank."""
    run_dir, folder = finished[0], finished[0].parents[1]
    (folder / "mine.py").write_text(SCORER)
    policy, reward = f"stage.actor_model={run_dir / 'sft' / 'model'}", run_dir / "rm" / "model"
    grpo = [
        *("stage=grpo", policy, "run_dir=grpo", "stage.rollout_batch_size=8", "stage.mini_batch_size=4"),
        *("stage.group_size=2", "stage.eval_prompts=4", "stage.iterations=9", "stage.eval_every=3"),
        *("stage.ema.decay=0.5", "stage.ptx.coef=0.5", "stage.health.missing_eos.action=stop"),
        *("scorer=function", "scorer.function=mine.py:score"),
    ]
    best = [
        *("stage=best_of_n", policy, f"stage.reward_model={reward}", f"scorer.others=[{reward}]"),
        *("scorer.weights=[1.0,0.5]", "stage.n=[1,4]", "run_dir=best", "hardware.gpus_per_node=1"),
    ]
    dpo = [
        *("stage=dpo", policy, "stage.batch_size=8", "stage.micro_batch_size_per_gpu=2", "stage.max_steps=6"),
        *("stage.optimizer.learning_rate=0.01", "stage.beta=1.0", "lora=r8", "memory=zero3", "run_dir=dpo"),
        "hardware.gpus_per_node=1",
    ]
    jobs = {"grpo": grpo, "best": best, "dpo": dpo}
    return launch_all({name: [*small_model(folder), *job] for name, job in jobs.items()}, folder)


Variants = dict[str, subprocess.CompletedProcess[str]]


def test_a_variant_with_a_function_that_scores_is_stopped_by_a_health_rule(
    finished: Finished, variants: Variants
) -> None:
    folder, done = finished[0].parents[1], variants["grpo"]
    assert done.returncode == 2, done.stdout + done.stderr
    assert "stopped at iteration 5 by the health rule missing_eos" in done.stderr
    assert "Traceback" not in done.stderr
    assert (folder / "grpo" / "report.html").is_file() and not (folder / "grpo" / "summary.json").exists()
    rows = [json.loads(line) for line in (folder / "grpo" / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "ptx/loss" in row]
    assert len(trained) == 5 and not any("critic/loss" in row for row in rows)
    own, average = (
        AutoModelForCausalLM.from_pretrained(folder / "grpo" / place / "model").state_dict() for place in ("", "ema")
    )
    assert any(not torch.equal(value, average[name]) for name, value in own.items())


def test_best_of_n_beats_one_answer(finished: Finished, variants: Variants) -> None:
    folder, done = finished[0].parents[1], variants["best"]
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (folder / "best" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 4]
    assert rows[0]["eval/kl_per_sequence"] == 0.0 and rows[1]["eval/kl_per_sequence"] == pytest.approx(0.636, abs=1e-3)
    assert rows[1]["eval/score"] > rows[0]["eval/score"]


def test_pairs_train_a_policy_directly(finished: Finished, variants: Variants) -> None:
    folder, done = finished[0].parents[1], variants["dpo"]
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((folder / "dpo" / "summary.json").read_text())
    assert summary["before"]["eval/loss"] == pytest.approx(0.6931, abs=1e-3)
    assert summary["after"]["eval/loss"] < 0.5 and summary["after"]["eval/accuracy"] > 0.9


def test_nothing_is_left_in_shared_memory(finished: Finished) -> None:
    assert left_by(finished[0]) == []
