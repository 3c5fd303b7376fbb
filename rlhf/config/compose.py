"""Composing without Hydra's command line: to find every mistake of a command line, and to tell what can be given."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from rlhf.config.explain import explain

_HIDDEN = ("schema", "tuned")  # Groups that the others choose.
USAGE = """RLHF on DeepSpeed - supervised fine-tuning, a reward model, then PPO.

Usage:
  python launch.py                                  the default: all three stages on this machine
  python launch.py stage=sft model=hf model.path=DIR data=files data.sources.main.path=FILE.jsonl
  python launch.py stage.ppo.kl_coef=0.1 seed=2     change any option by its key
  python launch.py mode=plan                        show what would run, and start nothing
  python launch.py stage=ppo model=opt13b hardware=8xa100 mode=plan    the same for other machines
  python launch.py mode=explain key=stage.ppo.kl_coef    what an option is, and where its value came from
  python launch.py experiment=NAME                  a recipe of conf/experiment/
  python launch.py --cfg job                        show the composed configuration
  python launch.py -m seed=1,2,3                    one run after the other for each value
  python launch.py -m sweep=NAME                    a sweep of sweeps/
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandLine:
    """What was given to launch.py: overrides, whether they are a sweep, the user's own configurations, and flags."""

    overrides: list[str] = field(default_factory=list)
    swept: bool = False
    config_name: str = "config"
    config_dir: str | None = None
    wants_help: bool = False

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> "CommandLine":
        """Read the arguments as Hydra does; wrong flags end the program with exit code 2."""
        flags = get_args_parser().parse_args(list(arguments))
        return cls(
            overrides=flags.overrides,
            swept=flags.multirun,
            config_name=flags.config_name or "config",
            config_dir=flags.config_dir,
            wants_help=flags.help,
        )


@contextmanager
def composing(conf: Path) -> Iterator[None]:
    """Hydra ready to compose the files below `conf`, whatever state its own command line was left in."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf), version_base="1.3"):
        yield


def compose_given(line: CommandLine, overrides: Iterable[str]) -> DictConfig:
    """Compose a run; inside `composing`. Hydra's own part becomes what `HydraConfig.get()` returns."""
    own = [f"hydra.searchpath=[{Path(line.config_dir).absolute()}]"] if line.config_dir else []
    composed = compose(line.config_name, overrides=[*own, *overrides], return_hydra_config=True)
    HydraConfig.instance().set_config(composed)
    with flag_override(composed, ["struct", "readonly"], [False, False]):
        del composed["hydra"]
    return composed


@dataclass(slots=True)
class Mistakes:
    """What is wrong with a command line, and the overrides of it that can be composed together."""

    problems: list[str]
    accepted: list[str]


def find_mistakes(line: CommandLine) -> Mistakes:
    """Add one override after the other and keep those that compose; inside `composing`.

    Groups go first, since the keys that there are depend on them. Of a sweep every value is tried. A configuration
    that does not compose without any override has no mistakes here.
    """
    found = Mistakes(problems=[], accepted=[])
    for override in sorted(line.overrides, key=_is_key):
        usable = []
        for single in _values(override, found.problems) if line.swept else [override]:
            try:
                compose_given(line, [*found.accepted, single])
                usable.append(single)
            except (HydraException, OmegaConfBaseException, ValueError) as error:
                found.problems.append(_elsewhere(single, line, found.accepted) or explain(error))
        found.accepted += usable[:1]
    return found


def _is_key(override: str) -> bool:
    return "." in override.split("=")[0] or override.startswith(("+", "~"))


def _values(override: str, problems: list[str]) -> list[str]:
    """A swept override as one for each value; what Hydra cannot read is a problem, a glob is left to it."""
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException as error:
        problems.append(explain(error))
        return []
    if not parsed.is_sweep_override():
        return [override]
    if parsed.is_choice_sweep() or parsed.is_range_sweep():
        return [f"{override.split('=')[0]}={value}" for value in parsed.sweep_string_iterator()]
    return []


def _elsewhere(override: str, line: CommandLine, accepted: list[str]) -> str | None:
    """A message for an option that another stage, or the pipeline, has under another key."""
    key = override.split("=")[0].lstrip("+~")
    if not key.startswith("stage."):
        return None
    known = list(_keys(compose_given(line, accepted)))
    if key in known:
        return None
    inner = key.removeprefix("stage.")
    tails = {inner, inner.partition(".")[2]} - {""}
    near = [name for name in known if any(name == f"stage.{t}" or name.endswith(f".{t}") for t in tails)]
    near = [name for name in near if name.startswith("stage.")]
    return f"unknown key {key}: did you mean {' or '.join(near)}?" if near else None


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
        for key in node:
            yield f"{prefix}{key!s}"
            yield from _keys(node._get_node(key), f"{prefix}{key!s}.")


def usage(conf: Path, line: CommandLine) -> str:
    """The text of --help: examples, every group's options, and every key with the value that it has."""
    groups = sorted(path for path in conf.iterdir() if path.is_dir() and path.name not in _HIDDEN)
    options = [f"  {group.name}: {', '.join(sorted(path.stem for path in group.glob('*.yaml')))}" for group in groups]
    with composing(conf):
        values = OmegaConf.to_yaml(compose_given(line, line.overrides)).rstrip().replace("\n", "\n  ")
    return "\n".join(
        [
            USAGE,
            "Groups (choose with group=option; a second model: model@reward_model=NAME,\n"
            "a further source: +source@data.sources.NAME=NAME):",
            *options,
            f"\nOptions (change with key=value):\n  {values}",
            "\nHydra's own flags: --hydra-help",
        ]
    )


def print_usage(conf: Path, line: CommandLine) -> None:
    """Write the text of --help to the terminal."""
    sys.stdout.write(usage(conf, line) + "\n")
