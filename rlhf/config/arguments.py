"""The words of a command line, before Hydra reads them: which are flags, which are options, and which are mistakes.

What was plainly meant is put right, so that everything else can be looked at, too; the mistake is told all the same.
Only what Hydra's grammar cannot read as it stands, such as `run_dir=~/runs`, is quoted without a word.
"""

import argparse
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from rlhf.config.choices import Mode

HIDDEN = ("schema", "tuned")  # Groups that the others choose.
_DIGITS = 4000  # Python reads no integer of more than 4,300 digits.
_SHOWN = 160  # Characters of a wrong word that are repeated.
_OPTION = re.compile(r"[+~]*[A-Za-z_][\w./@-]*=")
# Folders that Hydra would create: launch.py has places of its own.
_FOLDERS = {
    "hydra.run.dir": "a run is written to run_dir",
    "hydra.sweep.dir": "a sweep is written to runs/sweeps, and its runs to run_dir",
    "hydra.sweep.subdir": "a sweep is written to runs/sweeps, and its runs to run_dir",
    "hydra.output_subdir": "a run's configuration is in its run_dir",
    "hydra.job.chdir": "a run is written to run_dir; paths are relative to where launch.py is started",
}


@dataclass(kw_only=True, slots=True)
class Words:
    """A command line's words.

    `flags` are Hydra's with their values, `overrides` the options in a form that Hydra can read, `foreign` the flags of
    other tools with their values.
    """

    flags: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    foreign: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def group_options(places: Sequence[Path]) -> dict[str, list[str]]:
    """The groups below some directories, each with its options."""
    found: dict[str, set[str]] = {}
    for place in places:
        for folder in place.iterdir() if place.is_dir() else ():
            if folder.is_dir() and folder.name not in HIDDEN:
                found.setdefault(folder.name, set()).update(path.stem for path in folder.glob("*.yaml"))
    return {name: sorted(options) for name, options in sorted(found.items()) if options}


def read_words(arguments: Sequence[str], groups: Mapping[str, Sequence[str]]) -> Words:
    """Sort the words of a command line; `groups` are the groups that there are, with their options."""
    words = Words()
    actions = {name: action for action in get_args_parser()._actions for name in action.option_strings}
    rest = [word for word in arguments if word != "--"]
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name in actions:
            _flag(words, actions[name], name, value if equals else None, rest)
        elif _is_flag(word):
            values = [value] if equals else [rest.pop(0) for _ in range(_bare_words(rest))]
            numbers = all(each.isdigit() for each in values)  # As in  --step 1 2 3
            words.foreign.append((name, " ".join(values if numbers else values[:1])))
        elif _OPTION.match(word) or word.startswith("~"):
            words.overrides.append(_whole(words, word, rest, groups))
        else:
            words.overrides += _bare(words, word, rest, groups)
    words.overrides = [readable for text in words.overrides for readable in _readable(text, words.problems)]
    return words


def _is_flag(word: str) -> bool:
    return word.startswith("-") and len(word) > 1 and not word[1].isdigit()


def _bare_words(rest: Sequence[str]) -> int:
    """How many of the next words are neither options nor flags; the name in `name = value` is not counted."""
    for count, word in enumerate(rest):
        following = rest[count + 1] if count + 1 < len(rest) else ""
        if _OPTION.match(word) or _is_flag(word) or word.startswith(("=", "~")) or following.startswith("="):
            return count
    return len(rest)


def _flag(words: Words, action: argparse.Action, name: str, value: str | None, rest: list[str]) -> None:
    """One of Hydra's flags, with its value if it takes one."""
    choices = list(action.choices or ())
    if action.nargs == 0:
        if value is not None:
            words.problems.append(f"{name}={value}: {name} takes no value")
        words.flags.append(name)
        return
    if value is None and rest and not _is_flag(rest[0]) and (action.nargs != "?" or rest[0] in choices):
        value = rest.pop(0)
    if value is None and action.nargs == "?":
        words.flags.append(name)
    elif value is None:
        words.problems.append(f"{name}: needs a value: {', '.join(choices) or action.dest.upper()}")
    elif choices and value not in choices:
        words.problems.append(f"{name} {value}: must be one of {', '.join(choices)}")
    else:
        words.flags += [name, value]


def _whole(words: Words, word: str, rest: list[str], groups: Mapping[str, Sequence[str]]) -> str:
    """An option with what was torn off it by spaces."""
    count = _bare_words(rest)
    if not count or "=" not in word:
        return word
    if word.endswith("="):
        joined = word + rest.pop(0)
        words.problems.append(f"{word} {joined[len(word) :]}: write it without spaces: {joined}")
        return joined
    if _meant(rest[0], groups):
        return word
    joined = " ".join([word, *(rest.pop(0) for _ in range(count))])
    words.problems.append(f"{_short(joined)}: holds a space: put quotes around it: {shlex.quote(_short(joined))}")
    return joined


def _bare(words: Words, word: str, rest: list[str], groups: Mapping[str, Sequence[str]]) -> list[str]:
    """The option that a word without `=` stands for, if that is plain."""
    if word.startswith("="):
        words.problems.append(f"{_short(word)}: there is no name before the =")
        return []
    if rest and rest[0].startswith("="):
        given, value = f"{word} {rest[0]}", rest.pop(0)[1:]
        if not value and _bare_words(rest):
            value = rest.pop(0)
            given = f"{given} {value}"
        words.problems.append(f"{_short(given)}: write it without spaces: {_short(f'{word}={value}')}")
        return [f"{word}={value}"] if _OPTION.match(f"{word}=") else []
    meant = _meant(word, groups)
    if meant:
        words.problems.append(f"{word}: options are given as NAME=VALUE: did you mean {' or '.join(meant)}?")
        return meant if len(meant) == 1 else []
    if word in groups:
        words.problems.append(f"{word}: needs a value: {word}={'|'.join(groups[word])}")
    else:
        words.problems.append(
            f"{_short(word)}: options are given as NAME=VALUE, as in  seed=2; launch.py --help lists them"
        )
    return []


def _meant(word: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
    """The options that have a word as their value."""
    if word in Mode.__members__:
        return [f"mode={word}"]
    return [f"{group}={word}" for group, options in groups.items() if word in options]


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def _readable(override: str, problems: list[str]) -> Iterator[str]:
    """An override in a form that Hydra can read; nothing and a problem if there is none."""
    key, equals, value = override.partition("=")
    below = f"{key.lstrip('+~')}."
    if folders := [why for name, why in _FOLDERS.items() if f"{name}.".startswith(below)]:
        problems.append(f"{_short(override)}: {folders[0]}")
        return
    longest = max((len(digits) for digits in re.findall(r"\d+", value.replace("_", ""))), default=0)
    if longest > _DIGITS:
        problems.append(f"{key}={_short(value)}: is a number of {longest:,} digits")
        return
    if _parses(override):
        yield override
        return
    quoted = f"{key}='{value}{chr(92) * (len(value) - len(value.rstrip(chr(92))))}'"
    if equals and not re.search(r"[\[\]{}'\",]|\$\{", value) and _parses(quoted):
        yield quoted
        return
    opened = (
        any(value.count(a) != value.count(b) for a, b in ("[]", "{}")) or value.count("'") % 2 or value.count('"') % 2
    )
    what = "a bracket or a quote is not closed, or the value" if opened else "the value"
    example = shlex.quote(f'{key}="{value}"' if '"' not in value else f"{key}='{value}'")
    problems.append(f"{_short(override)}: cannot be read: {what} needs quotes inside quotes: {_short(example)}")


def _parses(override: str) -> bool:
    try:
        OverridesParser.create().parse_override(override)
    except (HydraException, ValueError, RecursionError):
        return False
    return True
