"""What was probably meant by an option that there is not: groups and their choices, keys, and files of one's own."""

import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import yaml
from omegaconf import OmegaConf

_PACKAGED = ("experiment", "sweep")  # Their files set options of all groups.
_MAPPINGS = ("columns", "environment")  # Options whose keys are names of the user's own.
_MOST = 4  # Suggestions at once.
_PACKAGE = "# @package _global_"


def ending_like(key: str, known: Collection[str]) -> list[str]:
    """The options that end like a key: stage.sft.epochs for epochs, stage.ppo.kl_coef for stage.kl_coef."""
    parts = key.split(".")
    for tail in (".".join(parts[start:]) for start in range(len(parts))):
        if found := [name for name in known if name == tail or name.endswith(f".{tail}")]:
            return found[:_MOST]
    return []


def similar_keys(key: str, known: Collection[str]) -> list[str]:
    """The options that a key may mean: those that end like it, else those whose last part is nearly its own."""
    names = {name.rpartition(".")[2] for name in known}
    near = difflib.get_close_matches(key.rpartition(".")[2], sorted(names), n=1, cutoff=0.7)
    return ending_like(key, known) or [name for name in known if near and name.rpartition(".")[2] == near[0]][:_MOST]


def own_name(key: str, value: str, known: Collection[str]) -> str:
    """What to say of a key below a mapping of names, such as columns.prompt ("" if it is none): it is added with +."""
    parent, _, name = key.rpartition(".")
    if parent.rpartition(".")[2] not in _MAPPINGS:
        return ""
    places = [place for place in known if place == parent or place.endswith(f".{parent}")]
    written = "  or  ".join(f"+{place}.{name}={value}" for place in places[:_MOST])
    return f"{key}={value}: a name of your own is added with +: {written}" if written else ""


def group_advice(override: str, groups: Mapping[str, Sequence[str]]) -> str:
    """What is wrong with a choice of a group ("" if nothing can be said before it is composed)."""
    target, _, value = override.partition("=")
    name, _, package = target.lstrip("+~").partition("@")
    value = value.strip("'\"")
    if target.startswith("~"):
        return f"{target}: a group cannot be removed: choose another of its options" if name in groups else ""
    if target.lstrip("+") == "reward_model" and "=" in override:
        return f"{override}: a second model is chosen by  model@reward_model={value or 'NAME'}"
    if name in groups and (listed := re.fullmatch(r"\[\s*(\w[\w.-]*)?.*\]", value)):
        return f"{override}: an option of a group is one name: write  {target}={listed[1] or groups[name][0]}"
    if name not in groups or re.match(r"[\[{$]", value):
        return ""
    if name == "source" and not package:
        place = "data.sources.NAME"
        return f"{override}: a source needs a name of its own: write  +source@{place}={value} {place}.path=…"
    if value not in groups[name]:
        return _no_choice(target.lstrip("+"), name, value, groups[name])
    if target.startswith("+") and not package:
        return f"{override}: leave the + out: {name}={value}"
    if name == "source" and not target.startswith("+"):
        return f"{override}: a further source is added with +: +{override}"
    return ""


def _no_choice(target: str, group: str, value: str, options: Sequence[str]) -> str:
    """There is no such option of a group: the nearest ones, or another way to say it."""
    if value == "null" and group in (*_PACKAGED, "model"):
        return "" if "@" in target or group != "model" else f"{target}=null: choose one, as in  model=tiny"
    lower = {option.lower(): option for option in options}
    near = [lower[value.lower()]] if value.lower() in lower else []
    near = near or [
        lower[name] for name in difflib.get_close_matches(value.lower().rpartition("/")[2], lower, n=3, cutoff=0.5)
    ]
    near = near or [option for option in options if value in option and (len(value) > 2 or value.isdigit())][:3]
    other = {
        "lora": f"lora.rank={value}" if value.isdigit() else "",
        "hardware": f"hardware.gpus_per_node={value}" if value.isdigit() else "",
        "model": f"{target}=hf {target.partition('@')[2] or 'model'}.path={value}" if "/" in value else "",
        "data": f"data=files data.sources.main.path={value}" if re.search(r"[./]", value) else "",
    }.get(group, "")
    written = [*(f"{target}={option}" for option in near), *([other] if other else [])]
    if written:
        return f"{target}={value}: there is no such option; did you mean {' or '.join(written)}?"
    return f"{target}={value}: there is no such option; options of {group} are {', '.join(options)}"


def file_problems(override: str, places: Sequence[Path]) -> Iterator[str]:
    """What is wrong with a file that an option of the groups experiment and sweep chooses."""
    group, _, name = override.lstrip("+").partition("=")
    for place in places if group in _PACKAGED else ():
        path = place / group / f"{name}.yaml"
        try:
            with path.open(encoding="utf-8") as file:
                head = file.readline(4096)
        except (OSError, UnicodeDecodeError, ValueError):
            continue
        if head.startswith("\ufeff"):
            yield f"{path}: begins with a byte order mark: save it as UTF-8 without one"
        elif re.match(r"#\s*@package\s+\S", head) is None:
            yield f"{path}: its first line must be  {_PACKAGE} , so that its keys are those of the whole configuration"


def broken_files(place: Path) -> Iterator[str]:
    """What cannot be read of the files of groups in a directory of the user's own, each with file and line."""
    from omegaconf._utils import get_yaml_loader

    for path in sorted({*place.glob("*.yaml"), *place.glob("*/*.yaml")}):
        try:
            content = yaml.load(path.read_text(encoding="utf-8"), Loader=get_yaml_loader())
            if content is not None and not isinstance(content, dict):
                yield f"{path}: holds no mapping of keys to values"
            elif isinstance((content or {}).get("defaults", []), list):
                OmegaConf.create(content or {})
            else:
                yield f"{path}: its key defaults must be a list"
        except yaml.YAMLError as error:
            yield f"{path}{yaml_reason(error)}"
        except UnicodeDecodeError as error:
            line = path.read_bytes()[: error.start].count(b"\n") + 1
            yield f"{path}:{line}: is not UTF-8"
        except OSError as error:
            yield f"{path}: cannot be read: {error.strerror}"
        except ValueError as error:
            digits = "digits" in str(error)
            yield f"{path}: {'has a number of more than 4,300 digits' if digits else str(error).splitlines()[0]}"
        except RecursionError:
            yield f"{path}: is nested too deeply"
        except Exception as error:  # OmegaConf raises errors of several kinds about keys and values.
            yield f"{path}: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"


def yaml_reason(error: yaml.YAMLError) -> str:
    """ ":LINE: reason" of an error in a YAML file."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        problem = str(error.problem or error.context or "is no YAML")
        if "'\\t'" in problem:
            problem = "a tab: YAML is indented by spaces"
        return f":{error.problem_mark.line + 1}: {problem}"
    if isinstance(error, yaml.reader.ReaderError):
        return f": has a character that YAML does not allow, at position {error.position}: {error.character!r}"
    return f": {str(error).splitlines()[0]}"
