"""Completion in the shell: `eval "$(.venv/bin/python launch.py -sc install=bash)"`, for every way to call launch.py.

Hydra's own knows the command `python launch.py` only, and shows an enumeration's value instead of its choices.
"""

import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from omegaconf import BooleanNode, DictConfig, EnumNode, OmegaConf

from rlhf.config.arguments import group_options
from rlhf.config.compose import CommandLine, compose_given, composing, known_keys

_COMMANDS = "python python3 python3.11 python3.12 python3.13 rlhf"
# Bash takes `=`, `:` and `@` for the ends of words: what stands before them is taken off the answers.
_BASH = r"""_rlhf_completion() {
    local line=${COMP_LINE:0:COMP_POINT} words word before answer
    read -ra words <<< "$line"
    case "${words[1]}" in
        launch.py|*/launch.py) ;;
        *) [ "${words[0]##*/}" = rlhf ] || return ;;
    esac
    case "$line" in *" ") word= ;; *) word=${words[-1]} ;; esac
    before=${word%"${word##*[=:@]}"}
    COMPREPLY=()
    while IFS= read -r answer; do
        COMPREPLY+=("${answer#"$before"}")
    done < <(COMP_LINE="$line" "${words[0]/#\~/$HOME}" ${words[1]:+"${words[1]/#\~/$HOME}"} -sc query=bash 2> /dev/null)
}
complete -o nospace -o default -F _rlhf_completion """


def complete(arguments: Sequence[str], conf: Path) -> int:
    """Do what -sc asks for and return the exit code: print the shell's script, or the answers to the line so far."""
    asked = next((word for word in arguments if word.startswith(("install=", "uninstall=", "query="))), "")
    if asked == "install=bash":
        print(_BASH + _COMMANDS)
    elif asked == "uninstall=bash":
        print(f"complete -r {_COMMANDS}; unset -f _rlhf_completion")
    elif asked.startswith("query="):
        print("\n".join(answers(os.environ.get("COMP_LINE", ""), conf)))
    else:
        print('Completion in bash:  eval "$(.venv/bin/python launch.py -sc install=bash)"')
        return 2
    return 0


def answers(line: str, conf: Path) -> list[str]:
    """What the last word of a command line can become; the words before it decide which options there are."""
    try:
        words = shlex.split(line)
    except ValueError:  # A quote that is not closed yet.
        words = line.split()
    first = next((at + 1 for at, word in enumerate(words[:2]) if word.endswith(("launch.py", "rlhf"))), 0)
    words = words[first:]
    word = words.pop() if words and not line.endswith(" ") else ""
    if word.startswith("-"):
        return sorted(
            name for action in get_args_parser()._actions for name in action.option_strings if name.startswith(word)
        )
    given = CommandLine.parse(words, conf)
    groups = group_options(given.places)
    with composing(conf):
        try:
            composed = compose_given(given, given.overrides)
        except Exception:  # Whatever is wrong before the word, the options of the default can be offered.
            composed = compose_given(CommandLine.parse([], conf), [])
    found = _values(word, composed, groups) if "=" in word else _names(word, composed, groups)
    return sorted({answer for answer in found if answer.startswith(word)})


def _names(word: str, composed: DictConfig, groups: dict[str, list[str]]) -> Iterator[str]:
    """Groups and options; of options that hold others the next level."""
    if "." not in word:
        yield from (f"{name}=" for name in groups if name != "source")
        yield "model@reward_model="
    parent = word.rpartition(".")[0]
    node = OmegaConf.select(composed, parent) if parent else composed
    for key in node if isinstance(node, DictConfig) else ():
        name = f"{parent}.{key!s}" if parent else str(key)
        yield f"{name}." if isinstance(node._get_node(key), DictConfig) else f"{name}="


def _values(word: str, composed: DictConfig, groups: dict[str, list[str]]) -> Iterator[str]:
    """The choices of a group, an enumeration or a Boolean, the options that mode=explain knows, else the value."""
    key = word.partition("=")[0]
    group = key.lstrip("+").partition("@")[0]
    if group in groups:
        yield from (f"{key}={option}" for option in groups[group])
        return
    if key == "key":
        yield from (f"key={name}" for name in known_keys(composed))
        return
    parent, _, name = key.rpartition(".")
    holder: Any = OmegaConf.select(composed, parent) if parent else composed
    node = holder._get_node(name) if isinstance(holder, DictConfig) else None
    if isinstance(node, EnumNode):
        yield from (f"{key}={choice}" for choice in node.enum_type.__members__)
    elif isinstance(node, BooleanNode):
        yield from (f"{key}={choice}" for choice in ("true", "false"))
    elif node is not None and not isinstance(node, DictConfig) and node._value() is not None:
        yield f"{key}={node._value()!s}"
