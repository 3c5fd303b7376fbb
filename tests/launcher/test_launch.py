"""The command line of launch.py: what it says, with which exit code, and what it does not write."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rlhf.launcher.command import PROJECT

pytestmark = pytest.mark.processes

SECRET = "0123456789abcdef"


def launch(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run launch.py in a folder."""
    environment = os.environ | {"RLHF_CACHE": str(folder / "cache"), "WANDB_API_KEY": SECRET}
    argv = [sys.executable, str(PROJECT / "launch.py"), *arguments]
    return subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_a_plan_shows_commands_and_writes_them(tmp_path: Path) -> None:
    done = launch(tmp_path, "mode=plan", "hardware=cpu", "memory=zero3")
    assert (done.returncode, done.stderr) == (0, "")
    commands = [line for line in done.stdout.splitlines() if "--module rlhf --config" in line]
    assert len(commands) == 3
    assert all("--num_accelerators 2" in line and "DS_ACCELERATOR=cpu" in line for line in commands)
    blocks = done.stdout.split("# Stage ppo: DeepSpeed configuration of the ")[1:]
    rendered = {block.split("\n")[0]: json.loads(block.split("\n", 1)[1].split("\n\n# ")[0]) for block in blocks}
    assert list(rendered) == ["actor", "critic", "reference", "reward model"]
    assert rendered["actor"]["zero_optimization"]["stage"] == 3
    tuned = "conf/tuned/ppo-tiny.yaml"
    assert f"stage.ppo.kl_coef={yaml.safe_load((PROJECT / tuned).read_text())['kl_coef']}" in done.stdout
    assert tuned in done.stdout
    (folder,) = tmp_path.glob("runs/*/plan")
    assert json.loads((folder / "ppo-actor.json").read_text()) == rendered["actor"]
    assert {path.name for path in folder.iterdir()} >= {"plan.txt", "config.yaml", "sft-model.json", "ppo-critic.json"}
    assert SECRET not in done.stdout + "".join(path.read_text() for path in folder.iterdir())
    # A plan keeps nobody from planning or running there, but what a run has written is left alone.
    run_dir = folder.parent
    (run_dir / "config.yaml").write_text("seed: 1")
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    again = launch(tmp_path, "mode=plan", "hardware=cpu", "memory=zero3")
    assert (again.returncode, again.stderr) == (0, "")
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before
    assert (tmp_path / "runs" / f"{run_dir.name}-plan" / "plan.txt").is_file()
    assert again.stdout.endswith(f"# Written to {run_dir}-plan\n")


def test_a_sweep_plans_every_job_and_ends_with_a_table(tmp_path: Path) -> None:
    done = launch(tmp_path, "-m", "seed=1,2", "stage=sft", "stage.batch_size=64,63", "mode=plan", "hardware=cpu")
    assert done.returncode == 2
    assert done.stderr.count("stage.batch_size=63") == 2
    assert "== 4 jobs, 2 failed" in done.stdout
    (table,) = tmp_path.glob("runs/sweeps/*/summary.csv")
    rows = list(csv.DictReader(table.open()))
    assert [(row["seed"], row["stage.batch_size"], row["state"]) for row in rows] == [
        ("1", "64", "done"),
        ("1", "63", "failed"),
        ("2", "64", "done"),
        ("2", "63", "failed"),
    ]
    assert table.with_name("summary.png").stat().st_size > 1000
    assert all(Path(row["run"], "plan", "plan.txt").is_file() for row in rows if row["state"] == "done")


def test_tuned_micro_batches_follow_the_number_of_gpus_but_given_ones_do_not(tmp_path: Path) -> None:
    done = launch(tmp_path, "mode=plan", "hardware=8xa100")
    assert done.returncode == 0
    assert "sft: 32 sequences per optimizer step = micro-batch 4 × accumulation 1 × 8 ranks" in done.stdout
    given = launch(tmp_path, "mode=plan", "hardware=8xa100", "stage.sft.micro_batch_size_per_gpu=32")
    assert given.returncode == 2
    assert (
        "stage.sft.batch_size=32 is not a multiple of stage.sft.micro_batch_size_per_gpu × ranks = 32 × 8"
        in given.stderr
    )


def test_an_option_is_explained_with_its_origin(tmp_path: Path) -> None:
    done = launch(tmp_path, "mode=explain", "key=stage.ppo.kl_coef", "stage.ppo.kl_coef=0.1")
    assert done.returncode == 0
    assert "Weight of the per-token KL penalty" in done.stdout
    assert "default  0.05" in done.stdout and "0.1  (from the command line)" in done.stdout
    tuned = launch(tmp_path, "mode=explain", "key=stage.ppo.iterations")
    assert "33  (from conf/tuned/ppo-tiny.yaml)" in tuned.stdout
    adjusted = launch(tmp_path, "mode=explain", "key=stage.sft.micro_batch_size_per_gpu", "hardware=8xa100")
    assert "used     4  (decided for this machine and model)" in adjusted.stdout
    unknown = launch(tmp_path, "mode=explain", "key=stage.ppo.kl_cof")
    assert (unknown.returncode, "did you mean stage.ppo.kl_coef" in unknown.stderr) == (2, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["stage=sfft"], "did you mean stage=sft?"),
        (["seed=one"], "seed: Value 'one'"),
        (["memory.zero_stage=4", "data.split.held_out=2"], "2 problems in the configuration"),
        (["stge=sft", "hardware=8xa10", "seed=-1"], "3 problems in the configuration"),
        (["data=files", "data.sources.main.path=broken.jsonl"], "broken.jsonl:2"),
        (["run_dir=."], "holds no run"),
    ],
)
def test_bad_input_is_one_message_and_nothing_is_written(tmp_path: Path, arguments: list[str], expected: str) -> None:
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": 1}\n')
    done = launch(tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"broken.jsonl", "cache"}


def test_values_of_the_users_own_directory_are_called_by_their_file(tmp_path: Path) -> None:
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "own" / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 9\n")
    done = launch(tmp_path, "--config-dir", "own", "experiment=mine", "mode=explain", "key=seed")
    assert (done.returncode, "9  (from own/experiment/mine.yaml)" in done.stdout) == (0, True), done.stderr


def test_the_doctor_tells_what_the_data_are(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Name number {n}.", "chosen": f"Number {n}, of course.", "rejected": "No.\x1b[2J"}
        for n in range(400)
    ]
    lines = [json.dumps(row) for row in rows] + ["{broken", json.dumps({**rows[0], "chosen": None})]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    given = [
        "mode=data",
        "data=files",
        "data.sources.main.path=rows.jsonl",
        "run_dir=r",
        "model.scratch.vocab_size=300",
    ]
    strict = launch(tmp_path, *given)
    assert strict.returncode == 2
    assert f"{tmp_path}/rows.jsonl:401: not valid JSON" in strict.stderr
    assert f'{tmp_path}/rows.jsonl:402: "chosen" is null' in strict.stderr
    small = launch(tmp_path, *given, "data.on_bad_row=skip", "stage.rm.batch_size=512", "stage.sft.batch_size=512")
    assert small.returncode == 2
    assert "sft_train" in small.stdout  # The table is shown all the same.
    assert "stage.rm.batch_size=512: the training part of stage rm has" in small.stderr and "data.txt" in small.stderr
    assert "stage.sft.batch_size=512: the training part of stage sft has" in small.stderr
    enough = [*given, "data.on_bad_row=skip", "stage.ppo.rollout_batch_size=32", "stage.ppo.mini_batch_size=32"]
    done = launch(tmp_path, *enough, "stage.ppo.micro_batch_size_per_gpu=8")
    assert done.returncode == 0, done.stderr
    assert "main" in done.stdout and "bad row" in done.stdout and "sft_train" in done.stdout
    assert "the chosen answer is the longer one in 100% of the pairs" in done.stdout
    assert "<|user|>Name number" in done.stdout and ", of course.</s>»" in done.stdout
    folder = tmp_path / "r" / "data"
    texts = done.stdout + strict.stderr + "".join((folder / f"data.{end}").read_text() for end in ("txt", "html"))
    assert "\x1b" not in texts and texts.count(r"No.\x1b[2J") > 2
    found = json.loads((tmp_path / "r" / "data" / "data.json").read_text())
    assert found["counts"]["dropped"]["bad row"] == 2
    assert found["overlaps"] == {}
    rows_of = {label: part["rows"] for label, part in found["counts"]["parts"].items()}
    held_out = rows_of["rm_held_out"]
    assert rows_of["sft_held_out"] == rows_of["ppo_held_out"] == held_out > 0  # The same prompts for every stage.
    assert sum(rows_of[f"{stage}_train"] for stage in ("sft", "rm", "ppo")) + held_out == 400
    page = (tmp_path / "r" / "data" / "data.html").read_text()
    assert "<mark>Number" in page and "data:image/png;base64," in page
    assert (tmp_path / "r" / "data" / "data.png").stat().st_size > 10_000
    # The same directory may then be trained in.
    assert launch(tmp_path, *enough, "stage.ppo.micro_batch_size_per_gpu=8", "mode=plan").returncode == 0


def test_hydra_flags_work(tmp_path: Path) -> None:
    shown = launch(tmp_path, "--cfg", "job", "seed=7")
    assert (shown.returncode, "seed: 7" in shown.stdout) == (0, True)
    usage = launch(tmp_path, "--help")
    assert (usage.returncode, "python launch.py mode=plan" in usage.stdout) == (0, True)
    assert list(tmp_path.iterdir()) == []


def test_launching_imports_no_heavy_library(tmp_path: Path) -> None:
    script = (
        "import sys; sys.argv = ['launch.py', 'mode=plan']; import launch; code = launch.main();"
        "heavy = {'torch', 'deepspeed', 'transformers', 'matplotlib', 'pandas', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy; sys.exit(code)"
    )
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_secrets_appear_nowhere_not_even_refused_ones(tmp_path: Path) -> None:
    given = ["+launcher.environment.HF_TOKEN=hf_given", "mode=plan", "stage=sft"]
    done = launch(tmp_path, "-m", "seed=1,2", *given)
    assert done.returncode == 2
    assert done.stderr.count("launcher.environment.HF_TOKEN: what looks like a secret") == 2
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".png"]
    assert "hf_given" not in done.stdout + done.stderr + "".join(path.read_text() for path in files)
    options = launch(tmp_path, "launcher=slurm", "hardware.nodes=2", "launcher.options='--export=A_KEY=hf_given'")
    assert options.returncode == 2
    assert "launcher.options=--export=A_KEY=***" in options.stderr
    plain = launch(tmp_path, "+launcher.environment.TOKENIZERS_PARALLELISM=true", "mode=plan", "stage=sft")
    assert plain.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["model=null"], "model=null: choose one, as in  model=tiny"),
        (["sweep=seeds"], "add -m"),
        (["mode=plan", "run_dir=."], "holds no run"),
        (["-m", "seed=1,2", "model=op13b"], "did you mean model=opt13b or "),
        (["mode=plan", "launcher.hostfile=hosts"], "launcher=local uses this machine only"),
        (["mode=plan", "memory.critic.offload_parameters=true"], "needs ZeRO stage 3 for that role"),
        (["mode=plan", "model=hf", "model.path=odd"], "config.json holds a list where an object belongs"),
        (["mode=plan", "hydra.run.dir=out"], "a run is written to run_dir"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, arguments: list[str], expected: str) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text("[]")
    done = launch(tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["odd"]


def test_jobs_in_processes_of_their_own_are_summed_up_too(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    done = launch(tmp_path, "-m", "stage=sft", "seed=-1,2", "hydra/launcher=submitit_local", "mode=plan")
    assert done.returncode == 2
    assert "== 2 jobs, 1 failed" in done.stdout
    assert "seed=-1: must be at least 0" in done.stdout
