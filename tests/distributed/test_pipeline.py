"""The whole pipeline in miniature, as a user starts it: launch.py, the real launcher, two ranks, three stages."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from miniature import launch, miniature
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], subprocess.CompletedProcess[str]]:
    """A finished run, the command line that made it, and what that printed."""
    folder = tmp_path_factory.mktemp("pipeline")
    arguments = [*miniature(folder), f"run_dir={folder / 'run'}", "memory=zero2"]
    return folder / "run", arguments, launch(*arguments)


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


def test_the_same_command_again_names_the_finished_run(finished: Finished) -> None:
    run_dir, arguments, _ = finished
    again = launch(*arguments)
    assert again.returncode == 2
    assert str(run_dir) in again.stderr
    assert "Traceback" not in again.stderr


def test_nothing_is_left_in_shared_memory(finished: Finished) -> None:
    assert not list(Path("/dev/shm").glob("deepspeed_*"))
