"""What is said about a command line, in the process: every mistake in one line, all of them at once."""

import functools
import json
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest
from test_compose import CONF, LAPTOP, composed

import launch
from rlhf.config.advice import group_advice
from rlhf.config.arguments import read_words
from rlhf.config.completion import answers
from rlhf.config.compose import CommandLine, _no_flag, compose_given, composing, known_keys
from rlhf.config.errors import ConfigError, listed
from rlhf.config.files import write_config
from rlhf.config.other_tools import flag_advice
from rlhf.config.secrets import names_secret, without_secrets
from rlhf.config.validate import value_problems
from rlhf.interpreter import talk_command
from rlhf.launcher.hardware import resolve, unused_ranks
from rlhf.launcher.rundir import PLAN as PLAN_FOLDER
from rlhf.launcher.rundir import claimed, folder_beside
from rlhf.stages import register_schemas
from rlhf.stages.preflight import cache_directory
from rlhf.stages.start import check_composed, give_home, start

ROOT = CONF.parent
PLAN = "mode=plan"


def said(*arguments: str) -> list[str]:
    """Every problem of a command line."""
    register_schemas()
    text = launch.every_problem(CommandLine.parse(arguments, CONF))
    assert "Traceback" not in text and "hydra.cc" not in text
    return [line.removeprefix("  - ") for line in text.splitlines() if " problems in the configuration" not in line]


@functools.cache
def keys(stage: str) -> list[str]:
    """The options that there are with a stage."""
    register_schemas()
    with composing(CONF):
        return list(known_keys(compose_given(CommandLine(), [f"stage={stage}"])))


def said_before_composing(*arguments: str) -> list[str]:
    """What can be told without composing, which is most."""
    line = CommandLine.parse(arguments, CONF)
    found = [_no_flag(*each, keys(line.stage)) for each in line.foreign]
    found = [
        flag_advice(*each, stage=line.stage, keys=keys(line.stage)) or other
        for each, other in zip(line.foreign, found, strict=True)
    ]
    return [*line.problems, *found, *filter(None, (group_advice(text, line.groups) for text in line.overrides))]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--actor-model", "1.3b"], ["--actor-model 1.3b: options have no dashes: write  model=opt1.3b"]),
        (
            ["--actor-model", "ORG/opt-99b"],
            ["--actor-model ORG/opt-99b: options have no dashes: write  model=hf model.path=ORG/opt-99b"],
        ),
        (["--step", "1", "2", "3"], ["--step 1 2 3: options have no dashes: write  stage=pipeline"]),
        (["--step", "2"], ["--step 2: options have no dashes: write  stage=rm"]),
        (
            ["--wandb_api_key=abc"],
            ["--wandb_api_key ***: there is no such flag; options have no dashes: write  NAME=VALUE, as in  seed=2"],
        ),
        (["stage=[sft]", PLAN], ["stage=[sft]: an option of a group is one name: write  stage=sft"]),
        (["hydra.run={dir: foo}", PLAN], ["hydra.run={dir: foo}: a run is written to run_dir"]),
        (["--actor_zero_stage=3"], ["or  memory.actor.zero_stage=3"]),
        (["--learning_rate", "1e-5", "stage=sft"], ["write  stage.optimizer.learning_rate=1e-5"]),
        (
            ["--learning_rate", "1e-5"],
            ["stage.sft.optimizer.learning_rate=1e-5  or  stage.rm.optimizer.learning_rate=1e-5"],
        ),
        (["--ppo_epochs", "2", "stage=sft"], ["write  stage=ppo stage.ppo_epochs=2"]),
        (["--offload", "--local_rank=0"], ["memory.offload_optimizer=true", "nothing to write for it"]),
        (["--config", "x.yaml"], ["write  experiment=NAME"]),
        (["--nproc_per_node=8"], ["write  hardware.gpus_per_node=8"]),
        (["--init_kl_coef", "0.1"], ["write  stage.ppo.kl_coef=0.1"]),
        (["--eval-every", "5"], ["there is no such flag; options have no dashes: write  stage.sft.eval_every=5  or  "]),
        (["--nonsense", "5"], ["--nonsense 5: there is no such flag"]),
        (["trainer.n_gpus_per_node=8"], ["write  hardware.gpus_per_node=8"]),
        (["+algorithm.kl_ctrl.kl_coef=0.1"], ["write  stage.ppo.kl_coef=0.1"]),
        (["algorithm.adv_estimator=grpo"], ["write  stage=grpo"]),
        (["stage", "=", "sft"], ["stage = sft: write it without spaces: stage=sft"]),
        (["stage=", "sft"], ["stage= sft: write it without spaces: stage=sft"]),
        (["stage", "=sft", "seed=x"], ["stage =sft: write it without spaces: stage=sft", "seed: Value 'x'"]),
        (["run_dir=my", "first", "run", PLAN], ["put quotes around it: 'run_dir=my first run'"]),
        (["sft"], ["did you mean stage=sft?"]),
        (["plan"], ["did you mean mode=plan?"]),
        (["stage"], ["stage: needs a value: stage=best_of_n|dpo|"]),
        (["train"], ["train: options are given as NAME=VALUE"]),
        (["=3"], ["there is no name before the ="]),
        (["lora=128"], ["did you mean lora=r128 or lora.rank=128?"]),
        (["model=TINY"], ["did you mean model=tiny?"]),
        (["model=facebook/opt-13b", PLAN], ["did you mean model=opt13b or "]),
        (["data=rows.jsonl"], ["did you mean data=files data.sources.main.path=rows.jsonl?"]),
        (["memory=3"], ["did you mean memory=zero3 or "]),
        (["stage.ppo.kl_coef=0,1"], ["add -m, as in  launch.py -m stage.ppo.kl_coef=0,1 "]),
        (["kl_coef=0,1"], ["a decimal number has a point: 0.1", "did you mean stage.ppo.kl_coef?"]),
        (["ppo.kl_coef=1"], ["did you mean stage.ppo.kl_coef?"]),
        (["lr=1e-4"], ["write  stage.sft.optimizer.learning_rate=1e-4"]),
        (["+experiment=dschat_opt1.3b_1xa6000"], ["leave the + out: experiment=dschat_opt1.3b_1xa6000"]),
        (["+stage=sft"], ["leave the + out: stage=sft"]),
        (["reward_model=opt350m"], ["model@reward_model=opt350m"]),
        (["~stage"], ["~stage: a group cannot be removed"]),
        (["columns.prompt=q", "data=hh", "model=opt125m", PLAN], ["+data.sources.hh_rlhf.columns.prompt=q"]),
        (["launcher.environment.A=b"], ["+launcher.environment.A=b"]),
        (["source=file"], ["write  +source@data.sources.NAME=file"]),
        (["hydra.run.dir=here"], ["a run is written to run_dir"]),
        (["hydra.sweep.dir=here"], ["a sweep is written to runs/sweeps"]),
        (["--config-dir", "/nowhere"], ["--config-dir /nowhere: there is no such directory"]),
        (["--config-name", "x"], ["--config-name x: there is no such file"]),
        (["--config-dir"], ["--config-dir: needs a value"]),
        (["--cfg", "jobs"], ["must be one of job, hydra, all"]),
        (["--help=me"], ["--help takes no value"]),
        (["seed=" + "9" * 5000], ["seed=999"]),
        (["run_dir=[a].b"], ["cannot be read: the value needs quotes inside quotes: 'run_dir=\"[a].b\"'"]),
        (["seed=[1"], ["a bracket or a quote is not closed"]),
        (["hardware.gpus_per_node=" + "9" * 30], ["must be at most 1024"]),
        (["seed=" + "9" * 30], ["must be at most 9.0072e+15"]),
        (["run_dir=" + "a" * 300], ["a name in this path has more than 255 bytes"]),
        (["model.name=" + "a" * 300], ["names a run directory"]),
        (["run_dir=caf\udce9"], ["is not UTF-8"]),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], expected: list[str]) -> None:
    found = said_before_composing(*arguments)
    if len(found) < len(expected):
        found = said(*arguments)
    assert len(found) == len(expected), found
    assert all(any(part in line for line in found) for part in expected), found
    assert all(len(line) < 600 for line in found)


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("run_dir=~/runs", os.path.expanduser("~/runs")),
        ("run_dir=/a=b/c", "/a=b/c"),
        ("run_dir=/x(1)", "/x(1)"),
        ("run_dir=/a b", "/a b"),
        ("run_dir=/a&b;c", "/a&b;c"),
        ("run_dir=/a\\", "/a\\"),
    ],
)
def test_what_hydra_cannot_read_as_it_stands_is_quoted(given: str, value: str) -> None:
    words = read_words([given], {})
    assert (words.problems, words.foreign) == ([], [])
    assert resolve(composed(*words.overrides), LAPTOP).run_dir == value


def test_flags_may_stand_anywhere_and_a_sweep_is_left_as_it_is() -> None:
    line = CommandLine.parse(["seed=1,2", "-m", "model=tiny", "--config-dir", str(CONF), "~data.sources.x"], CONF)
    assert line.arguments == ["-m", "--config-dir", str(CONF), "seed=1,2", "model=tiny", "~data.sources.x"]
    assert (line.swept, line.problems) == (True, [])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"# @package _global_\nseed:\n\tx: 1\n", "mine.yaml:3: a tab"),
        (b"# @package _global_\nseed: 1\nmode: plan\nseed: 2\n", "mine.yaml:4: found duplicate key seed"),
        (b"# @package _global_\nrun_dir: caf\xe9\n", "mine.yaml:2: is not UTF-8"),
        (b"# @package _global_\nseed: " + b"9" * 5000, "mine.yaml: has a number of more than 4,300 digits"),
        (b'# @package _global_\nrun_dir: "a\\0b"\n', "holds a null byte"),
        (b"# @package _global_\n- 1\n", "mine.yaml: holds no mapping"),
        (b"# @package _global_\nseed: [1\n", "mine.yaml:3: "),
        (b"# @package _global_\nsede: 1\n", "unknown key sede: did you mean seed? (in experiment/mine.yaml)"),
        (b"# @package _global_\ndefaults: 3\n", "mine.yaml: its key defaults must be a list"),
        (b"seed: 1\n", "mine.yaml: its first line must be  # @package _global_"),
    ],
)
def test_a_broken_file_of_ones_own_is_named(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_bytes(content)
    (found,) = said("--config-dir", str(tmp_path), "experiment=mine", PLAN)
    assert expected in found


def test_sources_are_added_without_a_file(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    given = (
        "+source@data.sources.mine=file",
        f"data.sources.mine.path={tmp_path}/rows.jsonl",
        "data=hh",
        "model=opt125m",
    )
    assert said(*given, PLAN) == []
    sources = composed(*given, "+source@data.sources.other=hub", "data.sources.other.path=a/b").data.sources
    assert {name: source.kind for name, source in sources.items()} == {"hh_rlhf": "hub", "mine": "file", "other": "hub"}


def test_published_recipes_train_on_the_published_mix() -> None:
    for path in (CONF / "experiment").glob("dschat_*.yaml"):
        data = composed(f"experiment={path.stem}").data
        assert (data.name, len(data.sources)) == ("deepspeed_chat", 6)


def test_the_option_key_is_no_secret() -> None:
    assert not names_secret("key") and not names_secret("stage.token_count") and not names_secret("KEYBOARD")
    assert all(map(names_secret, ("HF_TOKEN", "launcher.environment.WANDB_API_KEY", "PASSWORD", "KEY", "A_TOKEN2")))
    assert without_secrets("key=stage.x --export=A_KEY=b") == "key=stage.x --export=A_KEY=***"
    assert without_secrets("x_key=a,b,c seed=1,2 a_key=b,seed=3") == "x_key=*** seed=1,2 a_key=***,seed=3"
    assert without_secrets("--api-key abc: --cfg job --key x") == "--api-key ***: --cfg job --key ***"


@pytest.mark.parametrize(("key", "meant"), [("kl_coef", "stage.ppo.kl_coef"), ("stage.kl_cof", "stage.ppo.kl_coef")])
def test_explain_suggests_whole_keys(key: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"key={key}: there is no such option: did you mean {meant}"):
        start(composed("mode=explain", f"key={key}"), {}, in_sweep=False)


def test_batches_that_were_asked_for_do_not_change_the_number_of_ranks() -> None:
    given = ("model=opt125m", "hardware.accelerator=cpu", "stage=sft", "stage.batch_size=15", PLAN)
    with pytest.raises(ConfigError, match=r"stage.batch_size=15 is not a multiple of the 2 ranks: set it to 14 or 16"):
        check_composed(composed(*given), {"stage.batch_size": "command line"})
    config = composed(*given)
    resolved = resolve(config, LAPTOP)  # As a default it would: then that is told.
    assert resolved.hardware.gpus_per_node == 1
    assert "1 of 2 CPU ranks are used" in unused_ranks(config, resolved, LAPTOP)
    assert unused_ranks(composed(), resolve(composed(), LAPTOP), LAPTOP) == ""


def test_a_plan_is_not_written_into_a_runs_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = composed("stage=sft", f"run_dir={tmp_path / 'run'}", PLAN)
    (tmp_path / "run").mkdir()
    write_config(config, tmp_path / "run" / "config.yaml")
    start(config, {}, in_sweep=False)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]
    assert f"# Written to {tmp_path / 'run-plan'}" in capsys.readouterr().out


def test_values_that_nothing_can_be_computed_from_come_first() -> None:
    assert value_problems(composed()) == []
    assert value_problems(composed("memory.zero_stage=9")) == []  # Told with everything else.
    (found,) = value_problems(composed("data.sources.one_liners.path=" + "a" * 256))
    assert "more than 255 bytes" in found


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (".venv/bin/python launch.py mode=", ["mode=data", "mode=explain", "mode=plan", "mode=run"]),
        ("python3 /x/launch.py stage=r", ["stage=reinforce_pp", "stage=rloo", "stage=rm"]),
        ("rlhf model@reward_model=opt3", ["model@reward_model=opt30b", "model@reward_model=opt350m"]),
        ("python launch.py stage=ppo stage.kl_c", ["stage.kl_coef="]),
        ("python launch.py mode=explain key=stage.ppo.kl_c", ["key=stage.ppo.kl_coef"]),
        ("python launch.py tracking.wandb=", ["tracking.wandb=false", "tracking.wandb=true"]),
        ("python launch.py --config-d", ["--config-dir"]),
        ("python launch.py stage=nothing 'see", ["seed="]),
        ("python launch.py memory.precision=f", ["memory.precision=fp16", "memory.precision=fp32"]),
    ],
)
def test_words_are_completed(line: str, expected: list[str]) -> None:
    register_schemas()
    found = answers(line.replace("'", ""), CONF)
    assert found == expected


@pytest.mark.processes
def test_completion_in_bash_serves_the_commands_of_the_readme() -> None:
    """One start of launch.py for the script; what it asks launch.py for then is tested above."""
    python = Path(sys.executable)
    script = (
        f'eval "$({python} launch.py -sc install=bash)"; complete -p python; '
        f'COMP_LINE="{python} launch.py mode=p"; COMP_POINT=${{#COMP_LINE}}; _rlhf_completion; '
        'echo "[${COMPREPLY[*]}]"'
    )
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    rule, answer = done.stdout.splitlines()
    assert (rule.endswith("-F _rlhf_completion python"), answer) == (True, "[plan]"), done.stderr


@pytest.mark.processes
def test_an_interpreter_without_packages_is_named_with_the_one_to_use(tmp_path: Path) -> None:
    """-S leaves out what is installed, as the system's own python3 has nothing."""
    bare = [sys.executable, "-S", "-E"]
    for words in (["launch.py", "stage=sft"], ["-m", "rlhf.chat", "a b"]):
        done = subprocess.run([*bare, *words], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert f"{sys.executable} (Python " in done.stderr and " lacks " in done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.processes
def test_the_last_line_of_a_run_works_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "a run"
    (run / "model").mkdir(parents=True)
    (run / "model" / "config.json").write_text(json.dumps({"architectures": ["OPTForSequenceClassification"]}))
    monkeypatch.chdir(tmp_path)
    command = talk_command(str(run))
    assert command.endswith("-m rlhf.chat './a run'") and sys.executable in command
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, "is a reward model" in done.stderr) == (2, True), done.stderr


def test_a_user_without_a_home_is_told_what_to_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in containers that run under any number: neither HOME nor an entry in the system's list of users."""

    def unknown(_: int) -> None:
        raise KeyError

    for name in ("HOME", "RLHF_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(ConfigError, match="this user has no home directory: give cache_dir=DIR, or set HOME"):
        cache_directory(composed())
    give_home(composed(f"cache_dir={tmp_path}"))
    assert (os.environ["HOME"], os.environ["RLHF_CACHE"]) == (str(tmp_path), str(tmp_path))


@pytest.mark.processes
def test_a_terminal_without_unicode_shows_escapes(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), PLAN, "stage=sft", f"run_dir={tmp_path}/caf\u00e9"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        cwd=tmp_path,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"/caf\\xe9" in done.stdout and b"micro-batch 16 \\xd7 accumulation" in done.stdout


def test_a_sweep_that_nobody_could_wait_for_is_refused_before_its_jobs_are_listed() -> None:
    told = "a sweep of more than 10,000 jobs"
    # What else is wrong is told with it.
    found = said("-m", "seed=range(1,1e11)", "rollout.top_p=2", PLAN)
    assert found[0] == f"seed=range(1,1e11): {told}" and len(found) == 2 and "rollout.top_p=2.0" in found[1]
    many = ("seed=range(0,1000)", "stage.ppo.kl_coef=0.1,0.2", "data.split.seed=range(0,100)")
    assert said("-m", *many, PLAN) == [f"{' '.join(many)}: {told}"]


def test_a_thousand_values_of_a_sweep_are_not_all_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.config.compose._MOST_BAD", 3)
    lines = said("-m", "seed=range(1.5,900)", "rollout.top_p=2", PLAN)
    assert len(lines) == 4 and "rollout.top_p=2.0" in lines[-1]


def test_a_thousand_problems_are_not_all_listed() -> None:
    lines = listed([f"{number}" for number in range(1000)]).splitlines()
    assert lines[0] == "1000 problems in the configuration:" and lines[-2:] == ["  - 39", "  - and 960 more"]


def test_micro_batches_that_were_asked_for_stay_as_they_are() -> None:
    given = ("model=opt125m", "hardware.accelerator=cpu", "stage=sft", "stage.batch_size=6", PLAN)
    key = "stage.micro_batch_size_per_gpu"
    asked = {"stage.batch_size": "command line", key: "command line"}
    with pytest.raises(ConfigError, match=rf"stage.batch_size=6 is not a multiple of {key} × ranks = 4 × 2 = 8"):
        check_composed(composed(*given, f"{key}=4"), asked)


def test_a_plan_is_not_written_over_a_run_that_is_called_like_one(tmp_path: Path) -> None:
    run_dir, other = tmp_path / "run", tmp_path / "run-plan"
    assert folder_beside(run_dir, PLAN_FOLDER) == run_dir / "plan"
    with claimed(run_dir / "plan"):
        assert folder_beside(run_dir, PLAN_FOLDER) == other
    with claimed(other):
        assert folder_beside(run_dir, PLAN_FOLDER) == tmp_path / "run-plan-2"
    # A pipeline's stages, and whatever else is in its directory, are its own.
    with claimed(tmp_path / "whole"):
        (tmp_path / "whole" / "config.yaml").touch()
        for inner in ("sft", "sub/deeper"):
            assert folder_beside(tmp_path / "whole" / inner, PLAN_FOLDER) == tmp_path / "whole-plan"
