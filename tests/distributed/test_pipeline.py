"""The whole pipeline in miniature, as a user starts it: launch.py, the real launcher, two ranks, three stages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["film", "story", "plot", "cast", "scene", "music", "hero", "end", "joke", "shot"]


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run launch.py in the way that the README says."""
    return subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], subprocess.CompletedProcess[str]]:
    """A finished run, the command line that made it, and what that printed."""
    folder = tmp_path_factory.mktemp("pipeline")
    rows = [
        {
            "prompt": f"Tell me about the {first} and the {second}.",
            "chosen": f"The {first} was good, the {second} lovely.",
            "rejected": f"The {first} was bad, the {second} awful.",
        }
        for first in WORDS
        for second in WORDS
    ]
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    arguments = [
        *("data=files", f"data.sources.main.path={data}", f"run_dir={folder / 'run'}"),
        *("data.max_prompt_length=64", "data.max_response_length=32", "data.split.held_out=0.2", "memory=zero2"),
        *("model.scratch.vocab_size=320", "model.scratch.hidden_size=32", "model.scratch.num_layers=2"),
        *("model.scratch.num_heads=2", "model.scratch.intermediate_size=64"),
        *("stage.sft.batch_size=8", "stage.sft.micro_batch_size_per_gpu=2", "stage.sft.max_steps=2"),
        *("stage.rm.batch_size=8", "stage.rm.micro_batch_size_per_gpu=2", "stage.rm.max_steps=2"),
        *("stage.ppo.rollout_batch_size=8", "stage.ppo.mini_batch_size=4", "stage.ppo.micro_batch_size_per_gpu=1"),
        *("stage.ppo.iterations=2", "stage.ppo.eval_prompts=4"),
    ]
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
