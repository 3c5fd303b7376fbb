"""Chat templates that are given as options: as text, or as the path of a file."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rlhf.config.errors import ConfigError
from rlhf.config.schema import Config

_LONGEST = 2**20  # Bytes of a template's file: the longest ones that are published have some 20,000.


def chat_template_text(value: str | None, *, key: str = "model.chat_template") -> str | None:
    """The chat template itself, or that of the file that is named instead; raises ConfigError.

    What contains {{ or {% is a template, and everything else a path.
    """
    if not value or _is_template(value):
        return value or None
    try:
        path = Path(value).expanduser()
        if not path.is_file():
            raise ConfigError(f"{key}={value}: there is no such file, and a template has {{{{ or {{%")
        if path.stat().st_size > _LONGEST:
            raise ConfigError(f"{key}={value}: the file has more than {_LONGEST} bytes: that is no chat template")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{key}={value}: the file cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{key}={value}: the file is not UTF-8 text: {error.reason}") from error
    except RuntimeError as error:  # Of expanduser.
        raise ConfigError(f"{key}={value}: {error}") from error
    if not _is_template(text):
        raise ConfigError(f"{key}={value}: the file holds no Jinja template: neither {{{{ nor {{% is in it")
    return text


def _is_template(text: str) -> bool:
    return "{{" in text or "{%" in text


def template_problems(config: Config) -> Iterator[str]:
    """What is wrong with the files of chat templates."""
    for key, value in _templates(config).items():
        try:
            chat_template_text(value, key=f"{key}.chat_template")
        except ConfigError as error:
            yield from error.problems


def with_templates(config: Config) -> Config:
    """The configuration with the text of chat templates instead of their files' paths; what cannot be read stays.

    So the text is part of what a run is identified by, and ranks on other machines need no file.
    """
    changed = {}
    for key, value in _templates(config).items():
        try:
            changed[key] = replace(getattr(config, key), chat_template=chat_template_text(value))
        except ConfigError:
            continue  # One of `template_problems`.
    if "model" in changed and config.reward_model == config.model:
        changed["reward_model"] = changed["model"]
    return replace(config, **changed)


def _templates(config: Config) -> dict[str, str | None]:
    """By key; a reward model that is the model again is named once."""
    given = {"model": config.model, "reward_model": config.reward_model}
    return {key: given[key].chat_template for key in given if key == "model" or given[key] != config.model}
