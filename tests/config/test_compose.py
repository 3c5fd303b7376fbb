"""Every composition of the groups under conf/, and what is said about those that cannot be."""

import copy
import functools
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from rlhf.config.compose import CommandLine, compose_given, composing, find_mistakes, usage
from rlhf.config.errors import ConfigError
from rlhf.config.explain import explain
from rlhf.config.fields import undocumented
from rlhf.config.schema import Accelerator, Config, ModelConfig, Precision, ScorerConfig, StageConfig
from rlhf.launcher.hardware import Gpu, Machine, resolve
from rlhf.stages import from_composed, read_config, register_schemas, stage_config_class, stage_names, write_config

CONF = Path(__file__).parents[2] / "conf"
LAPTOP = Machine(cores=4, gpus=(), cpu_bf16=True, host_memory_gib=24.0)


def gpu(index: int, name: str = "NVIDIA A100-SXM4-80GB", *, capability: float = 8.0) -> Gpu:
    """A GPU of a machine."""
    return Gpu(index=index, name=name, memory_gib=80.0, capability=capability)


@functools.cache
def composed(*overrides: str) -> Config:
    """Compose conf/config.yaml as launch.py does. A quarter of a second: the same again is the same object."""
    plain = [text for text in overrides if VALUE.match(text)]
    whole = copy.deepcopy(base(*(text for text in overrides if text not in plain)))
    ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides(plain), whole)
    return from_composed(whole)


VALUE = re.compile(r"[a-z_]+\.[\w.]+=")  # One that chooses nothing and adds nothing: Hydra applies it in the end.


@functools.cache
def base(*overrides: str) -> Any:
    """What Hydra composes."""
    register_schemas()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def test_a_value_is_applied_as_hydra_does() -> None:
    given = ("stage=ppo", "stage.kl_coef=0.5", "rollout.stop=[a,b]", "launcher.master_port=null", "data.split.seed=3")
    assert composed(*given) == from_composed(copy.deepcopy(base(*given)))


def options(group: str) -> list[str]:
    """The options of a group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def message(*overrides: str) -> str:
    """What is said about overrides that cannot be composed."""
    with pytest.raises((ConfigError, HydraException, OmegaConfBaseException)) as raised:
        composed(*overrides)
    return explain(raised.value)


def test_the_other_groups_compose() -> None:
    listed = {group: options(group) for group in ("rollout", "scorer", "tracking", "launcher", "lora")}
    for index in range(max(map(len, listed.values()))):
        assert composed(*(f"{group}={names[index % len(names)]}" for group, names in listed.items())).seed == 1
    assert composed("tracking=wandb").tracking.wandb is True


def test_every_stage_folder_has_its_option() -> None:
    assert options("stage") == stage_names()


def test_tuned_values_follow_stage_and_model() -> None:
    tiny, smol = composed("stage=sft"), composed("stage=sft", "model=smollm2-135m")
    assert tiny.stage.optimizer.learning_rate > smol.stage.optimizer.learning_rate  # type: ignore[attr-defined]
    pipeline = composed().stage
    assert pipeline.sft == tiny.stage  # type: ignore[attr-defined]
    assert pipeline.ppo == composed("stage=ppo").stage  # type: ignore[attr-defined]
    adapted = ("model=smollm2-135m", "lora=r8")
    assert composed(*adapted).scorer.missing_eos_penalty == 1.6
    assert composed(*adapted, "scorer.missing_eos_penalty=0.5").scorer.missing_eos_penalty == 0.5
    for other in (("model=smollm2-135m",), (*adapted, "scorer=gsm8k")):
        assert composed(*other).scorer.missing_eos_penalty == ScorerConfig().missing_eos_penalty
    assert composed("stage.ppo.kl_coef=0.5").stage.ppo.kl_coef == 0.5  # type: ignore[attr-defined]


def test_the_reward_model_is_the_model_unless_another_is_chosen() -> None:
    same = resolve(composed("model.scratch.num_layers=2"), LAPTOP)
    assert same.reward_model == same.model
    assert same.reward_model.scratch.num_layers == 2
    other = resolve(composed("model@reward_model=smollm2-135m"), LAPTOP)
    assert (other.model.name, other.reward_model.name) == ("tiny", "smollm2-135m")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stage=sfft", "stage=sfft: there is no such option; did you mean stage=sft?"),
        ("stge=sft", "unknown key stge: did you mean stage?"),
        ("stage.ppo.kl_coeff=1", "unknown key stage.ppo.kl_coeff: did you mean stage.ppo.kl_coef?"),
        ("+stage.typo=1", "unknown key stage.typo: valid keys in stage are name, objective, sft, rm, ppo"),
        ("+sede=1", "unknown key sede: did you mean seed?"),
        ("stage.ppo.kl_coef=much", "stage.ppo.kl_coef: Value 'much' of type 'str' could not be converted to Float"),
        ("rollout.stop=abc", "rollout.stop: needs a list, as in  rollout.stop=[first,second]"),
        ("memory.precision=bf61", "expected one of [auto, bf16, fp16, fp32]"),
        ("data.sources.one_liner.part=x", "did you mean data.sources.one_liners?"),
        ("seed=${nothing}", "Interpolation key 'nothing' not found"),
        ("stage.name=sftt", "stage.name=sftt: there is no such stage: did you mean sft?"),
    ],
)
def test_what_cannot_be_composed_is_explained(override: str, expected: str) -> None:
    said = message(override)
    assert expected in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["stage=sfft", "seed=one", "modle=tiny", "memory.zero_stage=2"],
            [
                "stage=sfft: there is no such option",
                "unknown key modle: did you mean mode or model?",
                "seed: Value 'one'",
            ],
        ),
        (
            ["-m", "model=opt13,tiny,opt2.7", "seed=1,x", "hardware=8xa10"],
            ["model=opt13: ", "model=opt2.7: ", "hardware=8xa10: ", "seed: Value 'x'"],
        ),
        (["stage=ppo", "stage.ppo.kl_coef=1"], ["unknown key stage.ppo.kl_coef: did you mean stage.kl_coef?"]),
        (["stage.kl_coef=1"], ["unknown key stage.kl_coef: did you mean stage.ppo.kl_coef?"]),
        (["seed=[1", "stge=x"], ["seed=[1: cannot be read: a bracket or a quote is not closed", "unknown key stge"]),
    ],
)
def test_every_mistake_of_a_command_line_is_found(arguments: list[str], expected: list[str]) -> None:
    line = CommandLine.parse(arguments, CONF)
    register_schemas()
    with composing(CONF):
        found = find_mistakes(line)
        compose_given(line, found.accepted)
    assert len(found.problems) == len(expected), found.problems
    assert all(any(part in problem for problem in found.problems) for part in expected), found.problems


def test_an_option_cannot_be_removed_nor_left_open() -> None:
    assert message("~seed") == "~seed: an option cannot be removed; give it another value"
    assert message("stage.ppo.kl_coef=???") == "stage.ppo.kl_coef=???: needs a value"
    assert list(composed("~data.sources.one_liners").data.sources) == ["long_reviews"]


def test_help_lists_groups_and_options() -> None:
    register_schemas()
    shown = usage(CONF, CommandLine.parse(["--help", "seed=77"], CONF))
    assert "python launch.py mode=plan" in shown
    assert "  lora: none, r128, r64, r8\n" in shown
    assert "  seed: 77\n" in shown


def test_a_written_configuration_with_an_unknown_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    write_config(composed("stage=sft"), path)
    path.write_text(path.read_text().replace("batch_size: ", "batch_sise: ", 1))
    with pytest.raises(ConfigError, match=r"unknown key stage.batch_sise: did you mean stage.batch_size"):
        read_config(path)
    path.write_text("- 1")
    with pytest.raises(ConfigError, match="no mapping"):
        read_config(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(tmp_path / "missing.yaml")


def test_every_option_is_documented() -> None:
    seen: list[type] = []

    def visit(value: Any) -> None:
        seen.append(type(value))
        for entry in fields(value):
            inner = getattr(value, entry.name)
            if hasattr(inner, "__dataclass_fields__"):
                visit(inner)

    visit(Config())
    for name in stage_names():
        visit(stage_config_class(name)())
    assert StageConfig in seen
    assert {kind.__name__: undocumented(kind) for kind in seen if undocumented(kind)} == {}


def test_everything_automatic_is_decided() -> None:
    config = composed("data=files", "data.sources.main.path=rows.jsonl", "run_dir=r")
    cpu = resolve(config, replace(LAPTOP, cpu_bf16=False, cores=1))
    assert (cpu.hardware.accelerator, cpu.hardware.gpus_per_node, cpu.hardware.threads_per_rank) == (
        Accelerator.cpu,
        2,
        1,
    )
    assert cpu.memory.precision is Precision.fp32
    assert cpu.data.sources["main"].path == str(Path("rows.jsonl").absolute())
    assert cpu.run_dir == str(Path("r").absolute())
    old = tuple(gpu(index, "Tesla V100", capability=7.0) for index in (2, 3))
    found = resolve(config, Machine(cores=32, gpus=old, cpu_bf16=True))
    assert (found.hardware.accelerator, found.hardware.gpus_per_node, found.hardware.threads_per_rank) == (
        Accelerator.cuda,
        2,
        16,
    )
    assert found.memory.precision is Precision.fp16
    assert found.reward_model != ModelConfig()
