"""Every stage × model × hardware × memory: refused for lack of memory, or rendered and understood by DeepSpeed.

Composing a configuration takes more than a tenth of a second and there are over ten thousand. They are put together
from parts that are composed once; a sample, and what a file of conf/tuned/hardware/ may change, is composed for real.
`python tests/config/test_combinations.py --write` writes the plans of golden/ anew (`make reference` does it, too).
"""

import difflib
import inspect
import itertools
import json
import logging
import os
import random
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict
from test_compose import CONF, LAPTOP, options

from rlhf.config.errors import ConfigError
from rlhf.config.origins import value_origins
from rlhf.config.schema import Config, StageConfig
from rlhf.launcher.command import HOSTFILE, PROJECT, node_commands
from rlhf.launcher.ds_config import role_files
from rlhf.launcher.hardware import resolve
from rlhf.launcher.pipeline import StageRun
from rlhf.launcher.plan import plan_text, settings
from rlhf.planner.memory import ranks_of
from rlhf.stages import from_composed, register_schemas
from rlhf.stages.pipeline.steps import stage_runs
from rlhf.stages.start import check, defaults_of

GROUPS = ("stage", "model", "hardware", "memory")
Combination = tuple[str, str, str, str]
RUN_DIR = Path("/runs/here")
# Nothing of this machine: no free port, no count of cores.
FIXED = ("mode=plan", f"run_dir={RUN_DIR}", "launcher.master_port=29500", "hardware.threads_per_rank=1")
NEEDED = {"hf": ("model.path=ORG/NAME",)}  # What a choice cannot do without.
SAMPLED = 15

GOLDEN = Path(__file__).with_name("golden")
PLANS = {
    "default": (),
    "sft_opt125m_1xv100": ("stage=sft", "model=opt125m", "hardware=1xv100"),
    "ppo_opt13b_8xa100": ("stage=ppo", "model=opt13b", "model@reward_model=opt350m", "hardware=8xa100"),
    "pipeline_opt66b_64xa100_lora": (
        *("model=opt66b", "model@reward_model=opt350m", "hardware=64xa100"),
        *("lora=r128", "launcher=pdsh"),
    ),
    "sft_llama2-13b_64xh100_no_ssh": (
        *("stage=sft", "model=llama2-13b", "hardware=64xh100"),
        *("launcher=no_ssh", "launcher.master_addr=10.0.0.1"),
    ),
    "rm_opt2.7b_1xa6000_offload": ("stage=rm", "model=opt2.7b", "hardware=1xa6000", "memory=zero3-offload"),
    "pipeline_llama2-7b_8xh100": ("model=llama2-7b", "hardware=8xh100"),
    "ppo_qwen2.5-7b_64xa100_slurm": ("stage=ppo", "model=qwen2.5-7b", "hardware=64xa100", "launcher=slurm"),
    "experiment_dschat_opt13b_8xa100-40g": ("experiment=dschat_opt13b_8xa100-40g",),
    "dpo_opt1.3b_8xa100": ("stage=dpo", "model=opt1.3b", "hardware=8xa100"),
    "best_of_n_opt1.3b_1xa6000": ("stage=best_of_n", "model=opt1.3b", "hardware=1xa6000"),
    "pipeline_smollm2-135m_cpu": ("model=smollm2-135m", "hardware=cpu", "memory=zero3"),
}


@contextmanager
def conf() -> Iterator[None]:
    """Within this context Hydra composes conf/config.yaml, and the environment does not reach into plans."""
    register_schemas()
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RLHF_CACHE")}
    with patch.dict(os.environ, environment, clear=True), initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def composed(**choices: str) -> Config:
    """A plan with these choices."""
    chosen = [f"{group}={choice}" for group, choice in choices.items()]
    needed = NEEDED.get(choices.get("model", ""), ())
    return from_composed(compose("config", overrides=[*chosen, *needed, *FIXED]))


def is_tuned(stage: str, *others: str) -> bool:
    """Whether a file of conf/tuned/ is made for a stage and a model, or for these on a piece of hardware."""
    folder = CONF / "tuned" / "hardware" if len(others) == 2 else CONF / "tuned"
    return (folder / f"{'-'.join([stage, *others])}.yaml").is_file()


class Parts:
    """All options of the groups, several composed at a time, and the stages of models that have tuned values."""

    def __init__(self) -> None:
        listed = {group: options(group) for group in GROUPS}
        self.base = composed()
        self.options: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
        self.tuned: dict[tuple[str, str], StageConfig] = {}
        for index in range(max(len(names) for names in listed.values())):
            chosen = {group: names[index % len(names)] for group, names in listed.items()}
            config = composed(**chosen)
            names = (chosen["stage"], chosen["model"], chosen["hardware"])
            tuned = is_tuned(*names[:2]) or is_tuned(*names)
            for group in GROUPS[1:] if tuned else GROUPS:
                self.options[group][chosen[group]] = getattr(config, group)
        for stage, model in itertools.product(listed["stage"], listed["model"]):
            if is_tuned(stage, model):
                somewhere = next(name for name in listed["hardware"] if not is_tuned(stage, model, name))
                self.tuned[stage, model] = composed(stage=stage, model=model, hardware=somewhere).stage
        assert {group: sorted(found) for group, found in self.options.items()} == listed

    def combined(self, combination: Combination) -> Config:
        """The combination as it would be composed."""
        if is_tuned(*combination[:3]):
            return composed(**dict(zip(GROUPS, combination, strict=True)))
        parts = {group: self.options[group][name] for group, name in zip(GROUPS, combination, strict=True)}
        tuned = self.tuned.get(combination[:2])
        return replace(self.base, **parts if tuned is None else parts | {"stage": tuned})


def widened(stage: StageConfig, ranks: int) -> StageConfig:
    """Batches that so many ranks can share: tuned ones may be for fewer."""
    changed: dict[str, Any] = {}
    for entry in fields(stage):
        value = getattr(stage, entry.name)
        if isinstance(value, StageConfig):
            changed[entry.name] = widened(value, ranks)
        elif entry.name == "micro_batch_size_per_gpu":
            changed[entry.name] = 0 if any(role.batch_size % (value * ranks or 1) for role in stage.roles()) else value
        elif entry.name.endswith("batch_size"):
            unit = ranks * getattr(stage, "group_size", 1) if entry.name == "rollout_batch_size" else ranks
            changed[entry.name] = -(-value // unit) * unit if value is not None else None
    return replace(stage, **changed)


def commands_start_all_ranks(run: StageRun) -> None:
    """Check the commands of a stage: its configuration, and as many ranks as the hardware has GPUs."""
    path = run.directory / "config.yaml"
    commands = node_commands(run.config, config_path=path, gpus=())
    for _, command in commands:
        assert command.argv[-2:] == ("--config", str(path))
        assert command.argv[command.argv.index("--master_port") + 1] == "29500"
        hosts = "".join(text for file, text in command.files.items() if file.name.startswith(HOSTFILE))
        slots = [int(number) for number in re.findall(r"^\S+ slots=(\d+)$", hosts, flags=re.MULTILINE)]
        if not slots:
            option = "--num_accelerators" if run.config.hardware.accelerator.name == "cpu" else "--num_gpus"
            slots = [int(command.argv[command.argv.index(option) + 1])]
        assert (sum(slots), len(slots)) == (run.ranks, run.config.hardware.nodes)


@dataclass
class Outcome:
    """What became of all combinations: what was refused and why, and the different JSONs with their ranks."""

    combinations: list[Combination] = field(default_factory=list)
    refused: dict[Combination, str] = field(default_factory=dict)
    rendered: Counter[tuple[str, int]] = field(default_factory=Counter)


@pytest.fixture(scope="module")
def parts() -> Parts:
    with conf():
        return Parts()


@pytest.fixture(scope="module")
def outcome(parts: Parts) -> Outcome:
    """Plan all combinations."""
    found = Outcome(combinations=list(itertools.product(*map(options, GROUPS))))  # type: ignore[arg-type]
    with conf():
        for combination in found.combinations:
            add_plan(found, combination, parts.combined(combination))
    return found


def add_plan(outcome: Outcome, combination: Combination, config: Config) -> None:
    """Check a combination, and render it if it is accepted."""
    if config.hardware.gpus_per_node is not None:
        config = replace(config, stage=widened(config.stage, ranks_of(config)))
    config = resolve(config, LAPTOP)
    try:
        check(config, LAPTOP, {})
    except ConfigError as error:
        outcome.refused[combination] = str(error)
        return
    for run in stage_runs(config, RUN_DIR):
        commands_start_all_ranks(run)
        outcome.rendered.update((text, run.ranks) for text in role_files(run.config).values())


@pytest.mark.exhaustive
def test_parts_make_what_is_composed(parts: Parts) -> None:
    everything = list(itertools.product(*map(options, GROUPS)))
    tuned = [each for each in everything if each[:2] in parts.tuned]
    sample = random.Random(1)
    with conf():
        for combination in [*sample.sample(everything, SAMPLED - 5), *sample.sample(tuned, 5)]:
            real = composed(**dict(zip(GROUPS, combination, strict=True)))
            assert parts.combined(combination) == real, combination


@pytest.mark.exhaustive
def test_combinations_are_refused_for_lack_of_memory_only(outcome: Outcome) -> None:
    for combination, message in outcome.refused.items():
        problems = [line.removeprefix("  - ") for line in message.splitlines() if "problems in the" not in line]
        assert problems and all(problem.startswith("memory.") for problem in problems), (combination, message)
    accepted = [combination for combination in outcome.combinations if combination not in outcome.refused]
    assert len(outcome.combinations) > 10_000
    assert len(accepted) > 0.5 * len(outcome.combinations), len(accepted)
    for index, group in enumerate(GROUPS):
        assert {combination[index] for combination in accepted} == set(options(group)), group


class Read(dict[str, Any]):
    """A mapping that notes which of its keys are looked up."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.seen: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.seen.add(key)
        return super().__getitem__(key)


def understood(content: dict[str, Any], ranks: int) -> tuple[Any, set[str]]:
    """DeepSpeed's reading of a JSON on so many ranks, and the keys that it does not know; warnings are errors."""
    from deepspeed.runtime import config as deepspeed_config

    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger, read = logging.getLogger("DeepSpeed"), Read(content)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    try:
        # It asks a process group for the ranks, and counts one if there is none.
        with patch.object(deepspeed_config, "dist", SimpleNamespace(get_rank=lambda: 0)), warnings.catch_warnings():
            warnings.simplefilter("error")
            parsed = deepspeed_config.DeepSpeedConfig(
                read, mpu=SimpleNamespace(get_data_parallel_world_size=lambda: ranks)
            )
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert said == []
    return parsed, unknown(content, parsed, read.seen)


def unknown(content: dict[str, Any], parsed: Any, seen: set[str]) -> set[str]:
    """Keys that nothing in DeepSpeed or in torch's AdamW has a meaning for."""
    found = {key for key in content if key not in seen}
    models = {
        "zero_optimization": parsed.zero_config,
        "zero_optimization.offload_optimizer": parsed.zero_config.offload_optimizer,
        "zero_optimization.offload_param": parsed.zero_config.offload_param,
        "bf16": parsed.bfloat16_config,
        "fp16": parsed.float16_config,
    }
    for place, model in models.items():
        given = content
        for key in place.split("."):
            given = given.get(key, {})
        declared = type(model).model_fields.items() if given else []
        known = {name for key, entry in declared for name in (key, entry.alias)}
        found |= {f"{place}.{key}" for key in given if key not in known}
    optimizer = content.get("optimizer", {})
    found |= {f"optimizer.{key}" for key in optimizer if key not in ("type", "params")}
    known = {*inspect.signature(torch.optim.AdamW).parameters, "torch_adam"}
    return found | {f"optimizer.params.{key}" for key in optimizer.get("params", {}) if key not in known}


@pytest.mark.exhaustive
def test_deepspeed_understands_everything_that_is_rendered(outcome: Outcome) -> None:
    assert outcome.rendered
    for text, ranks in outcome.rendered:
        content = json.loads(text)
        parsed, strange = understood(content, ranks)
        assert strange == set(), text
        assert parsed.train_batch_size == content["train_batch_size"]
        assert parsed.train_micro_batch_size_per_gpu == content["train_micro_batch_size_per_gpu"]
        assert parsed.gradient_accumulation_steps == content["gradient_accumulation_steps"]
        assert parsed.zero_optimization_stage == content["zero_optimization"]["stage"]
        assert parsed.gradient_clipping == content["gradient_clipping"]
        assert parsed.bfloat16_config.enabled is ("bf16" in content)
        assert parsed.float16_config.enabled is ("fp16" in content)
        assert parsed.optimizer_params == content.get("optimizer", {}).get("params")


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("place", "key"),
    [
        ([], "gradient_clippin"),
        (["optimizer"], "parameters"),
        (["optimizer", "params"], "learning_rate"),
        (["optimizer", "params"], "adam_torch"),
    ],
)
def test_a_misspelt_key_would_be_noticed(outcome: Outcome, place: list[str], key: str) -> None:
    """DeepSpeed itself takes these without a word."""
    content = next(each for each in (json.loads(text) for text, _ in outcome.rendered) if {*place[:1]} <= {*each})
    inner = content
    for name in place:
        inner = inner[name]
    inner[key] = True
    ranks = content["train_batch_size"] // (
        content["train_micro_batch_size_per_gpu"] * content["gradient_accumulation_steps"]
    )
    assert understood(content, ranks)[1] == {".".join([*place, key])}


def plan(*overrides: str) -> str:
    """What `mode=plan` prints for overrides on a machine without GPUs, without what differs between machines."""
    with conf():
        whole = compose("config", overrides=[*overrides, *FIXED], return_hydra_config=True)
        HydraConfig.instance().set_config(whole)
        try:
            origins = value_origins(CONF)
        finally:
            HydraConfig.instance().cfg = None
        with open_dict(whole):
            del whole["hydra"]
        config = from_composed(whole)
        resolved = resolve(config, LAPTOP)
        check(resolved, LAPTOP, origins)
        changed = settings(config, defaults_of(config), origins)
        if overrides:
            # The mix is the same in all plans: one that shows it is enough.
            changed = [setting for setting in changed if not setting.key.startswith("data.")]
        text = plan_text(resolved, stage_runs(resolved, RUN_DIR), run_dir=RUN_DIR, gpus=(), changed=changed)
    for launcher in (
        str(Path(sys.executable).with_name("deepspeed")),
        f"{sys.executable} -m deepspeed.launcher.runner",
    ):
        text = text.replace(launcher, "deepspeed")
    return text.replace(str(PROJECT), "PROJECT") + "\n"


@pytest.mark.parametrize("name", PLANS)
def test_plans_are_what_they_were(name: str) -> None:
    path = GOLDEN / f"{name}.txt"
    old, new = path.read_text(encoding="utf-8") if path.is_file() else "", plan(*PLANS[name])
    changed = list(difflib.unified_diff(old.splitlines(), new.splitlines(), str(path), "now", lineterm="", n=1))
    assert old == new, "\n".join(["a plan has changed; if it is meant to, run  make reference", *changed[:60]])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("model=opt1.3b", "lora=r128", "hardware=1xa100"), "2.66 more to generate (a whole copy)"),
        (
            ("model=opt1.3b", "lora=r128", "hardware=1xa100", "rollout.gather=false"),
            "2.66 more to generate (not made, so it generates as it is)",
        ),
        (
            ("model=opt1.3b", "hardware=8xa100", "memory=zero3", "rollout.gather=false"),
            "2.45 more to generate (not made, so transformers generates without one)",
        ),
        (
            ("model=opt30b", "model@reward_model=opt350m", "lora=r128", "hardware=1xa100"),
            "57.31 more to generate (too large beside them, so it generates as it is)",
        ),
        (
            ("model=opt1.3b", "hardware=8xa100", "lora=r8", "rollout.tensor_parallel=2"),
            "1.33 more to generate (a copy shared by 2 ranks)",
        ),
    ],
)
def test_a_plan_says_what_generation_copies(overrides: tuple[str, ...], said: str) -> None:
    assert f"ppo: the policy takes {said}" in plan("stage=ppo", *overrides)


def test_a_plan_says_what_is_trained_through_adapters() -> None:
    sizes = ("stage=ppo", "model=opt1.3b", "model@reward_model=opt350m", "hardware=8xa100", "lora=r128")
    own = plan(*sizes, "lora.critic_rank=64", "lora.learning_rate=5e-4")
    assert "ppo: actor: rank 128, 113.25 of 1429.00 million parameters are trained, learning rate 0.0005" in own
    assert "ppo: critic: rank 64, 28.31 of 359.51 million parameters are trained, learning rate 0.0005" in own
    assert "lora.critic_rank=64" in own and "lora.learning_rate=0.0005" in own
    whole = plan(*sizes, "lora.critic_rank=0", "stage.critic_optimizer.learning_rate=2e-5")
    assert "ppo: critic: none, all weights are trained" in whole
    assert "ppo: actor: rank 128, 113.25 of 1429.00 million parameters are trained, learning rate 1e-05" in whole
    assert "# Adapters" not in plan(*sizes[:-1])
    assert "stage.dropout=0.1 " in plan("stage=sft", "model=opt1.3b", "hardware=8xa100", "stage.dropout=0.1")


def test_there_is_a_plan_for_every_file() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == set(PLANS)


def write_plans() -> None:
    """Write all files of golden/ anew."""
    GOLDEN.mkdir(exist_ok=True)
    for path in GOLDEN.iterdir():
        path.unlink()
    for name, overrides in PLANS.items():
        (GOLDEN / f"{name}.txt").write_text(plan(*overrides), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/config/test_combinations.py --write")
    write_plans()
