"""The reference of all groups and options, written from the typed fields and the files under conf/. Imports no torch.

`python -m rlhf.stages.reference` prints it, `python -m rlhf.stages.reference FILE` writes it (`make reference`).
"""

import re
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from rlhf.config.fields import bounds, field_doc
from rlhf.config.files import to_plain
from rlhf.config.schema import Config, StageConfig
from rlhf.launcher.command import PROJECT
from rlhf.stages import stage_config_class, stage_names

INTRODUCTION = """\
# Configuration reference

Written by `make reference` from the fields of the configuration and the files under `conf/`: do not edit it.

`python launch.py GROUP=CHOICE KEY=VALUE …` chooses a file of a group and changes single options, as in
`python launch.py stage=ppo model=opt13b hardware=8xa100 stage.kl_coef=0.1`. In a pipeline the options of a stage stand
one level lower: `stage.ppo.kl_coef`. `python launch.py mode=explain key=KEY` tells what an option is and where its
value came from.

The defaults below are those of the typed fields. A choice of a group sets its own over them, and so do the values that
are tuned for a stage and a model, `conf/tuned/STAGE-MODEL.yaml`, and over those the ones for adapters,
`conf/tuned/lora/STAGE-MODEL-LORA.yaml`, and for a piece of hardware, `conf/tuned/hardware/STAGE-MODEL-HARDWARE.yaml`;
a scorer's are in `conf/tuned/scorer/SCORER-MODEL-LORA.yaml`.
`NAME` in a key stands for a name that you choose yourself."""
_WORDS: dict[Any, str] = {
    bool: "`true` or `false`",
    int: "integer",
    float: "number",
    str: "text",
    types.NoneType: "`null`",
}
_PLURALS = {int: "integers", float: "numbers", str: "texts"}
_ESCAPED = r"\\\1"
_NOT_CHOSEN = ("tuned",)  # Found by the other choices.
_RECIPES = {
    "experiment": "Files that choose and set options of all groups.",
    "sweep": "Several runs, one after the other, for values that a file lists: with `-m`.",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What the reference says of one option."""

    key: str
    type: str
    default: str
    allowed: str
    meaning: str


def reference(conf: Path) -> str:
    """The whole reference as Markdown; `conf` is the directory of the groups."""
    return "\n".join([INTRODUCTION, *_run(), *_stages(conf), *_groups(conf), *_recipes(conf)]) + "\n"


def rows(config: Any, prefix: str = "") -> Iterator[Row]:
    """The options of a configuration object with its defaults, in their order; nested ones by their dotted keys."""
    hints = typing.get_type_hints(type(config))
    for entry in fields(config):
        key, value, doc = f"{prefix}{entry.name}", getattr(config, entry.name), field_doc(entry)
        inner = _value_class(hints[entry.name])
        if isinstance(value, StageConfig):
            anchor = f"stage{value.name}"
            meaning = f"{doc} Its options are those of [stage={value.name}](#{anchor})."
            yield Row(key=f"{key}.*", type="options", default="", allowed="", meaning=meaning)
        elif is_dataclass(value) or inner is not None:
            below = f"{key}.NAME" if inner is not None else key
            yield Row(key=f"{below}.*", type="options", default="", allowed="", meaning=doc)
            yield from rows(value if inner is None else inner(), f"{below}.")
        else:
            yield Row(
                key=key, type=type_words(hints[entry.name]), default=shown(value), allowed=bounds(entry), meaning=doc
            )


def _value_class(hint: Any) -> type | None:
    """The dataclass of a mapping's values, if there is one."""
    arguments = typing.get_args(hint)
    is_mapping = typing.get_origin(hint) is dict and is_dataclass(arguments[1])
    return typing.cast(type, arguments[1]) if is_mapping else None


def type_words(hint: Any) -> str:
    """A field's annotation in words; the choices of an enumeration are spelled out."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(type_words(argument) for argument in arguments)
    if origin is list:
        return f"list of {_PLURALS[arguments[0]]}"
    if origin is dict:
        return f"mapping of names to {_PLURALS[arguments[1]]}"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return ", ".join(f"`{choice.name}`" for choice in hint)
    return _WORDS[hint]


def shown(value: Any) -> str:
    """A default as YAML would have it."""
    plain = to_plain(value)
    if plain is None or isinstance(plain, bool):
        return f"`{'null' if plain is None else str(plain).lower()}`"
    if isinstance(plain, list):
        return f"`[{', '.join(str(entry) for entry in plain)}]`"
    if plain == "" or plain == {}:
        return '`""`' if plain == "" else "`{}`"
    return f"`{plain:g}`" if isinstance(plain, float) else f"`{plain}`"


def comment(path: Path) -> str:
    """The comment that a YAML file begins with, on one line; Hydra's own comments are left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @"):
            lines.append(line.removeprefix("#").strip())
    return " ".join(lines)


def _table(header: Sequence[str], content: Sequence[Sequence[str]]) -> Iterator[str]:
    yield ""
    for cells in (header, ["---"] * len(header), *content):
        yield f"| {' | '.join(re.sub(r'([|<])', _ESCAPED, cell) for cell in cells)} |"


def _options(listed: Iterable[Row]) -> Iterator[str]:
    content = [[f"`{row.key}`", row.type, row.default, row.allowed, row.meaning] for row in listed]
    yield from _table(["option", "type", "default", "allowed", "meaning"], content)


def _choices(conf: Path, group: str, *, said: dict[str, str] | None = None) -> Iterator[str]:
    """The files of a group with what they say of themselves; `said` is what is known of those that say nothing."""
    paths = sorted((conf / group).glob("*.yaml"), key=lambda path: path.stem)
    if paths:
        table = [[f"`{group}={path.stem}`", comment(path) or (said or {}).get(path.stem, "")] for path in paths]
        yield from _table(["choice", "what it is"], table)


def _run() -> Iterator[str]:
    """The options that belong to no group."""
    groups = [entry.name for entry in fields(Config) if is_dataclass(getattr(Config(), entry.name))]
    yield from ("", "## The run")
    yield from _options(row for row in rows(Config()) if row.key.split(".")[0] not in groups)


def _first_line(config_class: type) -> str:
    return (config_class.__doc__ or "").strip().split("\n")[0]


def _stages(conf: Path) -> Iterator[str]:
    classes = {name: stage_config_class(name) for name in stage_names()}
    yield from ("", "## stage", "", "What to train.")
    yield from _choices(conf, "stage", said={name: _first_line(kind) for name, kind in classes.items()})
    for name, kind in classes.items():
        yield from ("", f"### stage={name}", "", _first_line(kind))
        yield from _options(rows(kind(), "stage."))


def _groups(conf: Path) -> Iterator[str]:
    seen: dict[type, str] = {}
    for entry in fields(Config):
        value = getattr(Config(), entry.name)
        if not is_dataclass(value) or isinstance(value, StageConfig):
            continue
        yield from ("", f"## {entry.name}", "", field_doc(entry))
        same = seen.setdefault(type(value), entry.name)
        if same != entry.name:
            yield (
                f"Its options are those of [{same}](#{same}), as `{entry.name}.KEY`; "
                f"`{same}@{entry.name}=CHOICE` chooses it."
            )
            continue
        yield from _choices(conf, entry.name)
        yield from _options(rows(value, f"{entry.name}."))


def _recipes(conf: Path) -> Iterator[str]:
    """The groups that set options of the others."""
    known = [entry.name for entry in fields(Config)]
    for folder in sorted(path for path in conf.iterdir() if path.is_dir() and path.name not in (*known, *_NOT_CHOSEN)):
        listed = list(_choices(conf, folder.name))
        if listed:
            yield from ("", f"## {folder.name}", "", _RECIPES.get(folder.name, ""))
            yield from listed


def main(arguments: Sequence[str]) -> int:
    """Print the reference, or write it to the file that is named."""
    text = reference(PROJECT / "conf")
    if arguments:
        Path(arguments[0]).write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
