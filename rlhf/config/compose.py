"""Composing without Hydra's command line: to find every mistake of a command line, and to tell what can be given."""

import copy
import itertools
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, flag_override

from rlhf.config.advice import broken_files, ending_like, file_problems, group_advice, own_name, similar_keys
from rlhf.config.arguments import HIDDEN, group_options, read_words
from rlhf.config.explain import explain, unknown_keys
from rlhf.config.other_tools import flag_advice, key_advice
from rlhf.config.secrets import names_secret

_MOST_JOBS = 10_000
_MOST_VALUES = 100  # Values of a swept option that are tried one by one, a third of a second each,
_MOST_BAD = 10  # until so many of them have a problem.
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
    """What was given to launch.py: overrides, whether they are a sweep, the user's own configurations, and flags.

    `arguments` are flags and overrides in a form that Hydra can read, `foreign` flags of other tools with their values.
    `groups` are the options of all groups, `places` the directories that have them.
    `composable`: whether there is a file of that name to begin with.
    """

    overrides: list[str] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    foreign: list[tuple[str, str]] = field(default_factory=list)
    groups: dict[str, list[str]] = field(default_factory=dict)
    places: list[Path] = field(default_factory=list)
    swept: bool = False
    config_name: str = "config"
    config_dir: str | None = None
    wants_help: bool = False
    completion: bool = False
    composable: bool = True

    @classmethod
    def parse(cls, arguments: Sequence[str], conf: Path) -> "CommandLine":
        """Read the arguments; `conf` is the directory of the groups. Nothing is raised: mistakes are `problems`."""
        flags = get_args_parser().parse_args(read_words(arguments, {}).flags)
        places = [conf, *([Path(flags.config_dir)] if flags.config_dir else [])]
        groups = group_options(places)
        words = read_words(arguments, groups)
        for override in list(words.overrides):
            key, _, value = override.lstrip("+~").partition("=")
            if advice := key_advice(key, value, stage=_stage(words.overrides, groups)):
                words.overrides.remove(override)
                words.problems.append(advice)
        if flags.config_path:
            words.problems.append("--config-path: the groups are in conf/; --config-dir DIR adds your own to them")
        if flags.multirun:
            swept = endless_sweep(words.overrides)
            words.problems += [f"{' '.join(swept)}: a sweep of more than {_MOST_JOBS:,} jobs"] if swept else []
            # To list their values is what takes for ever.
            words.overrides = [text for text in words.overrides if text not in swept]
        composable = any((place / f"{flags.config_name or 'config'}.yaml").is_file() for place in places)
        if flags.config_dir and not Path(flags.config_dir).is_dir():
            words.problems.append(f"--config-dir {flags.config_dir}: there is no such directory")
            flags.config_dir = None
        elif not composable:
            words.problems.append(f"--config-name {flags.config_name}: there is no such file in {places[-1]}")
        return cls(
            overrides=words.overrides,
            arguments=[*words.flags, *words.overrides],
            problems=words.problems,
            foreign=words.foreign,
            groups=groups,
            places=places,
            swept=flags.multirun,
            config_name=flags.config_name or "config",
            config_dir=flags.config_dir,
            wants_help=flags.help,
            completion=flags.shell_completion,
            composable=composable,
        )

    @property
    def stage(self) -> str:
        """The stage that is chosen, as far as the words say it."""
        return _stage(self.overrides, self.groups)


def _stage(overrides: Sequence[str], groups: Mapping[str, Sequence[str]]) -> str:
    chosen = [text.partition("=")[2] for text in overrides if text.startswith("stage=")]
    return chosen[-1] if chosen and chosen[-1] in groups.get("stage", ()) else "pipeline"


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
    found = Mistakes(problems=list(line.problems), accepted=[])
    if not line.composable:
        return found
    values = _Values(line)
    for override in sorted(line.overrides, key=_is_key):
        usable, bad = [], 0
        for single in _values(override, found.problems, swept=line.swept):
            said = [text for text in (group_advice(single, line.groups),) if text] or [
                *file_problems(single, line.places)
            ]
            if not said:
                try:
                    composed = values.composed(single, found.accepted)
                    # What + adds is looked at only when the whole becomes typed objects.
                    added = next(unknown_keys(composed), "") if single.startswith("+") else ""
                    said = _unknown(added, line, single, found.accepted) if added else []
                    usable += [] if added else [single]
                except Exception as error:  # Files of the user's own can raise whatever YAML and Hydra raise.
                    said = explained(error, line, single, found.accepted)
            found.problems += said
            bad += bool(said)
            if bad == _MOST_BAD:
                break
        found.accepted += usable[:1]
    if line.foreign:
        keys = _known_keys(line, found.accepted)
        for flag, value in line.foreign:
            found.problems.append(flag_advice(flag, value, stage=line.stage, keys=keys) or _no_flag(flag, value, keys))
    return found


class _Values:
    """Tries overrides. Hydra applies those of values last, so what the others compose is kept for the next one."""

    def __init__(self, line: CommandLine) -> None:
        self._line = line
        self._known: dict[tuple[str, ...], DictConfig] = {}  # What overrides compose: those before, and the last.

    def composed(self, override: str, accepted: Sequence[str]) -> DictConfig:
        """What an override composes beside accepted ones; raises what Hydra raises."""
        if not self._is_value(override) or (before := self._before(tuple(accepted))) is None:
            return compose_given(self._line, [*accepted, override])
        whole = copy.deepcopy(before)
        ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides([override]), whole)
        self._known = {tuple(accepted): before, (*accepted, override): whole}
        return whole

    def _is_value(self, override: str) -> bool:
        key = override.lstrip("+~").partition("=")[0]
        return key not in (*self._line.groups, *HIDDEN) and re.fullmatch(r"(?!hydra\b)\w+(\.\w+)*", key) is not None

    def _before(self, accepted: tuple[str, ...]) -> DictConfig | None:
        if accepted not in self._known:
            try:
                self._known = {accepted: compose_given(self._line, accepted)}
            except Exception:  # With the override it fails again, and is explained.
                return None
        return self._known[accepted]


def explained(error: Exception, line: CommandLine, override: str, accepted: Sequence[str]) -> list[str]:
    """What to say of an error that composing an override raised."""
    kinds = yaml.YAMLError | ValueError | OSError | RecursionError
    if line.config_dir is not None and (isinstance(error, kinds) or "Cannot merge" in str(error)):
        broken = [*broken_files(Path(line.config_dir))]
        if broken:
            return broken
    reason = explain(error)
    key, named = override.lstrip("+~").partition("=")[0], reason.removeprefix("unknown key ").partition(":")[0]
    return (
        _unknown(reason, line, override, accepted)
        if reason.startswith("unknown key ") and f"{key}.".startswith(f"{named}.")
        else [reason]
    )


def _unknown(reason: str, line: CommandLine, override: str, accepted: Sequence[str]) -> list[str]:
    """What to say of an option that there is not; `reason` is what is known without the other options."""
    key, _, value = override.lstrip("+~").partition("=")
    keys = _known_keys(line, accepted)
    advice = own_name(key, value, keys)
    near = ending_like(key, keys)
    if not advice and not near:
        advice = flag_advice(key, value, stage=line.stage, keys=keys).replace("options have no dashes: ", "")
    if not advice and (near or "did you mean" not in reason):
        near = near or similar_keys(key, keys)
        advice = f"unknown key {key}: did you mean {' or '.join(near)}?" if near else ""
    return [advice or reason]


def _no_flag(flag: str, value: str, keys: Sequence[str]) -> str:
    near = similar_keys(flag.lstrip("-").replace("-", "_"), keys)
    written = "  or  ".join(f"{key}={value or 'VALUE'}" for key in near) or "NAME=VALUE, as in  seed=2"
    value = "***" if value and names_secret(flag.replace("-", "_")) else value
    return f"{flag} {value}".strip() + f": there is no such flag; options have no dashes: write  {written}"


def _known_keys(line: CommandLine, accepted: Sequence[str]) -> list[str]:
    """The keys that there are with these overrides; every mistake asks for them, and composing takes a while."""
    asked = (line.config_name, line.config_dir, *accepted)
    if asked not in _KNOWN:
        try:
            _KNOWN[asked] = list(known_keys(compose_given(line, accepted)))
        except Exception:  # What is wrong is told already.
            return []
    return _KNOWN[asked]


_KNOWN: dict[tuple[str | None, ...], list[str]] = {}


def _is_key(override: str) -> bool:
    return "." in override.split("=")[0] or override.startswith(("+", "~"))


def _values(override: str, problems: list[str], *, swept: bool) -> list[str]:
    """An override as one for each value that it gives; several values without -m are a problem."""
    parsed = OverridesParser.create().parse_override(override)
    if not parsed.is_sweep_override():
        return [override]
    key, _, value = override.partition("=")
    if not swept:
        number = f"; a decimal number has a point: {value.replace(',', '.')}" if re.fullmatch(r"\d+,\d+", value) else ""
        problems.append(
            f"{override}: several values are a sweep: add -m, as in  launch.py -m {override} ; "
            f"a list has brackets: {key}=[{value}]{number}"
        )
    if parsed.is_choice_sweep() or parsed.is_range_sweep():
        values = [f"{key}={each}" for each in itertools.islice(parsed.sweep_string_iterator(), _MOST_VALUES)]
        return values if swept else values[:1]
    return []  # A glob is left to Hydra.


def endless_sweep(overrides: Sequence[str]) -> list[str]:
    """The overrides whose values Hydra would combine for ever; a search draws from its ranges, and lists none."""
    if any(override.lstrip("+").startswith(("sweep=", "hydra/sweeper=")) for override in overrides):
        return []
    jobs, swept = 1.0, []
    for override in overrides:
        try:
            parsed = OverridesParser.create().parse_override(override)
        except Exception:  # Told elsewhere.
            continue
        span: Any = parsed.value()
        if parsed.is_range_sweep():
            jobs *= max(1.0, (float(span.stop or 0) - float(span.start or 0)) / float(span.step or 1))
            swept.append(override)
        elif parsed.is_choice_sweep():
            jobs *= len(span.list)
            swept.append(override)
    return swept if jobs > _MOST_JOBS else []


def known_keys(node: Any, prefix: str = "") -> Iterator[str]:
    """The dotted keys of a composed configuration."""
    if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
        for key in node:
            yield f"{prefix}{key!s}"
            yield from known_keys(node._get_node(key), f"{prefix}{key!s}.")


def usage(conf: Path, line: CommandLine) -> str:
    """The text of --help: examples, every group's options, and every key with the value that it has."""
    groups = sorted(path for path in conf.iterdir() if path.is_dir() and path.name not in HIDDEN)
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
