"""Run directories, launch commands and progress on the terminal."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf.config.errors import ConfigError
from rlhf.config.files import write_config
from rlhf.config.schema import Accelerator, Config, HardwareConfig, LauncherConfig, Mode, ModelConfig, Reuse
from rlhf.launcher.command import launch_command
from rlhf.launcher.hardware import cpu_computes_bf16, is_path
from rlhf.launcher.progress import ProgressFollower
from rlhf.launcher.rundir import check_run_dir, claimed, move_aside, with_run_dir
from rlhf.stages.pipeline.config import PipelineConfig
from rlhf.stages.pipeline.steps import stage_runs


def config(**changes: object) -> Config:
    """A configuration of the pipeline on two CPU ranks."""
    hardware = HardwareConfig(accelerator=Accelerator.cpu, gpus_per_node=2, threads_per_rank=1)
    model = ModelConfig(name="tiny")
    base = Config(stage=PipelineConfig(), model=model, reward_model=model, hardware=hardware)
    return replace(base, **changes)  # type: ignore[arg-type]


def test_the_name_tells_runs_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    name = with_run_dir(config()).run_dir
    assert name is not None
    assert re.fullmatch(rf"{tmp_path}/runs/pipeline-tiny--seed1-[0-9a-f]{{8}}", name)
    assert with_run_dir(config(mode=Mode.plan)).run_dir == name
    assert with_run_dir(config(cache_dir="/elsewhere")).run_dir == name
    assert with_run_dir(config(reuse=Reuse.off)).run_dir == name
    assert with_run_dir(config(launcher=LauncherConfig(node_rank=1))).run_dir == name
    # After a reboot, or on another machine of the same kind, a little more memory may be seen.
    seen = replace(config().hardware, threads_per_rank=2, host_memory_gib=23.4, gpu_memory_gib=79.1, network_gbs=9.0)
    assert with_run_dir(config(hardware=seen)).run_dir == name
    assert with_run_dir(config(hardware=replace(seen, gpus_per_node=1))).run_dir != name
    assert with_run_dir(config(seed=2)).run_dir != name
    assert with_run_dir(config(run_dir="/given")).run_dir == "/given"


def test_names_of_models_and_data_make_names_of_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    name = with_run_dir(config(model=ModelConfig(name="org/\x1b[31m model" + "映" * 300))).run_dir
    assert name is not None and Path(name).parent == tmp_path / "runs"
    assert Path(name).name.startswith("pipeline-org_31m_model映映") and len(Path(name).name.encode()) < 255
    Path(name).mkdir(parents=True)
    for character in ("\x1b[31m", "\n", "\u202e", "\udcff"):
        with pytest.raises(ConfigError, match=r"run_dir='.*holds characters that cannot be shown"):
            check_run_dir(tmp_path / f"run{character}", config(), finished=False)


def test_a_directory_is_used_only_if_it_is_free_or_can_go_on(tmp_path: Path) -> None:
    run_dir, settings = tmp_path / "run", config()
    assert check_run_dir(run_dir, settings, finished=False) is False
    run_dir.mkdir()
    assert check_run_dir(run_dir, settings, finished=False) is False
    (run_dir / "plan").mkdir()  # What mode=plan leaves is no run.
    assert check_run_dir(run_dir, settings, finished=False) is False
    (run_dir / "notes.txt").touch()
    with pytest.raises(ConfigError, match="holds no run"):
        check_run_dir(run_dir, settings, finished=False)
    write_config(settings, run_dir / "config.yaml")
    assert check_run_dir(run_dir, settings, finished=False) is True
    (run_dir / "report.html").touch()
    with pytest.raises(ConfigError, match=r"has finished: its report is .*report\.html"):
        check_run_dir(run_dir, settings, finished=True)
    with pytest.raises(ConfigError, match=r"in seed"):
        check_run_dir(run_dir, config(seed=5), finished=False)
    with pytest.raises(ConfigError, match="is a file"):
        check_run_dir(run_dir / "notes.txt", settings, finished=False)


def test_only_one_launch_writes_a_directory(tmp_path: Path) -> None:
    with claimed(tmp_path / "run"), pytest.raises(ConfigError, match="another"), claimed(tmp_path / "run"):
        pass
    with claimed(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()


def test_half_written_stages_are_kept_aside(tmp_path: Path) -> None:
    assert move_aside(tmp_path / "sft") is None
    (tmp_path / "sft" / "plan").mkdir(parents=True)
    assert move_aside(tmp_path / "sft") is None
    for number in (1, 2):
        (tmp_path / "sft" / "command.txt").write_text(str(number))
        (tmp_path / "sft" / ".lock").touch()
        assert move_aside(tmp_path / "sft") == tmp_path / "sft" / f"failed-{number}"
        assert (tmp_path / "sft" / f"failed-{number}" / "command.txt").read_text() == str(number)
    assert {path.name for path in (tmp_path / "sft").iterdir()} == {".lock", "plan", "failed-1", "failed-2"}


def test_each_stage_takes_the_formers_model(tmp_path: Path) -> None:
    sft, rm, ppo = stage_runs(config(), tmp_path)
    assert [run.name for run in (sft, rm, ppo)] == ["sft", "rm", "ppo"]
    assert rm.config.stage.sft_model == str(tmp_path / "sft" / "model")  # type: ignore[attr-defined]
    assert ppo.config.stage.actor_model == str(tmp_path / "sft" / "model")  # type: ignore[attr-defined]
    assert ppo.config.stage.reward_model == str(tmp_path / "rm" / "model")  # type: ignore[attr-defined]
    other = stage_runs(config(reward_model=ModelConfig(name="other")), tmp_path)[1]
    assert other.config.stage.sft_model is None  # type: ignore[attr-defined]


def test_a_stage_is_finished_when_all_ranks_are(tmp_path: Path) -> None:
    run = stage_runs(config(), tmp_path)[0]
    (run.directory / "done").mkdir(parents=True)
    (run.directory / "done" / "rank0").touch()
    assert not run.is_finished
    (run.directory / "done" / "rank1").touch()
    assert run.lost_its_model and not run.is_finished
    (run.directory / "model").mkdir()
    assert run.is_finished


def test_the_command_takes_the_visible_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_CACHE", "cache")
    on_gpus = config(hardware=HardwareConfig(accelerator=Accelerator.cuda, gpus_per_node=2, threads_per_rank=8))
    path = Path("/run/config.yaml")
    assert "--num_gpus 2 " in launch_command(on_gpus, config_path=path, gpus=(0, 1, 2)).shell()
    chosen = launch_command(on_gpus, config_path=path, gpus=(2, 3))
    assert "--include localhost:2,3 " in chosen.shell()
    assert "--num_gpus" not in chosen.shell()
    environment = chosen.environment({"RLHF_CACHE": "cache", "RANK": "3", "WANDB_API_KEY": "secret"})
    assert environment["RLHF_CACHE"] == str(Path("cache").absolute())
    assert environment["OMP_NUM_THREADS"] == "8"
    assert "RANK" not in environment
    assert environment["WANDB_API_KEY"] == "secret"
    assert "secret" not in chosen.shell()
    assert str(chosen.port) in chosen.argv


def test_deepspeed_is_told_that_there_is_no_hostfile() -> None:
    from deepspeed.launcher.runner import fetch_hostfile, parse_args

    for accelerator in (Accelerator.cpu, Accelerator.cuda):
        local = config(hardware=HardwareConfig(accelerator=accelerator, gpus_per_node=2, threads_per_rank=1))
        command = launch_command(local, config_path=Path("/run/config.yaml"), gpus=(0, 1))
        parsed = parse_args(list(command.argv[1:]))
        # Its default is a file that some clusters have; whoever reads it starts the ranks by ssh.
        assert parsed.hostfile != parse_args(["--module", "rlhf"]).hostfile == "/job/hostfile"
        assert fetch_hostfile(parsed.hostfile) is None


def test_what_a_cpu_computes_in() -> None:
    assert cpu_computes_bf16("processor: 0\nflags\t\t: fpu avx512f avx512_bf16 amx_tile\n")
    assert cpu_computes_bf16("Features\t: fp asimd bf16\n")
    assert not cpu_computes_bf16("flags\t\t: fpu avx512f\nmodel name: bf16\n")


def test_hub_names_are_not_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert not is_path("facebook/opt-125m")
    assert is_path("./facebook/opt-125m")
    (tmp_path / "facebook" / "opt-125m").mkdir(parents=True)
    assert is_path("facebook/opt-125m")


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress_overwrites_on_a_terminal_only(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    plain, terminal = io.StringIO(), Terminal()
    followers = [ProgressFollower(path, plain), ProgressFollower(path, terminal)]
    for follower in followers:
        follower.poll()
    lines = [("step 1", True), ("step 2", True), ("evaluated", False), ("step 3", True)]
    with path.open("a") as file:
        file.writelines(json.dumps({"text": text, "transient": transient}) + "\n" for text, transient in lines)
        file.write('{"text": "half a li')
    for follower in followers:
        follower.poll()
        follower.finish()
    assert plain.getvalue() == "step 2\nevaluated\n"
    assert terminal.getvalue() == "\r\x1b[2Kstep 2\r\x1b[2Kevaluated\n\r\x1b[2Kstep 3\n"
    with path.open("a") as file:
        file.write('ne", "transient": false}\n')
    followers[0].finish()
    assert plain.getvalue().endswith("half a line\n")
