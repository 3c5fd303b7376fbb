"""The one door to what a user names: a model's configuration, weights and tokenizer, from a directory or the hub.

Files are looked at first (`rlhf.config.model_directory`); what a library still finds wrong becomes one message. No code
of a model is ever run. Imports no torch by itself.
"""

import contextlib
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from rlhf.config.errors import ConfigError
from rlhf.config.model_directory import check_directory, check_tokenizer_files
from rlhf.config.model_files import read_object
from rlhf.interpreter import PROJECT

CPU_SECONDS, WALL_SECONDS, MEMORY = 60, 300, 16 * 2**30
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model"),
)
_OURS = (ConfigError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError)


@contextmanager
def told(what: str) -> Iterator[None]:
    """Whatever a library raises within this context becomes a ConfigError: "WHAT cannot be loaded: reason".

    Native code of tokenizers raises what is no Exception. Memory that is used up is no fault of the files.
    """
    try:
        yield
    except _OURS:
        raise
    except BaseException as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise ConfigError(f"{what} cannot be loaded: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """The first line of what an error says, with its kind where the message alone says little.

    The hub's checks of types name the field in the first line and say what is wrong in the second.
    """
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    told = lines[: 2 if "ValidationError" in type(error).__name__ else 1]
    message = ": ".join(line.rstrip(":") for line in told)[:300]
    plain = isinstance(error, OSError | ValueError) and not isinstance(error, UnicodeError) and len(message) > 20
    return (
        message
        if plain or (type(error) is Exception and message)
        else f"{type(error).__name__}: {message}".rstrip(": ")
    )


def load_config(name_or_path: str | Path, *, revision: str | None = None, **entries: Any) -> Any:
    """A model's configuration (a transformers PreTrainedConfig); raises ConfigError."""
    from transformers import AutoConfig

    if os.path.isdir(name_or_path):
        check_directory(Path(name_or_path))
    with told(f"the configuration of {name_or_path}"):
        return AutoConfig.from_pretrained(name_or_path, revision=revision, trust_remote_code=False, **entries)


def load_model(
    auto_class: Any,
    name_or_path: str | Path,
    *,
    may_lack: Collection[str] = (),
    revision: str | None = None,
    **options: Any,
) -> Any:
    """A model with all of its weights; raises ConfigError.

    Args:
        auto_class: of transformers, as AutoModelForCausalLM.
        name_or_path: a directory, whose weights must be safetensors, or a name on the hub.
        may_lack: names of weights that may be new.
        revision: on the hub.
        options: of from_pretrained.
    """
    is_local = os.path.isdir(name_or_path)
    if is_local:
        check_directory(Path(name_or_path))
    options |= {"revision": revision, "trust_remote_code": False, "output_loading_info": True}
    # The hub's OPT models are pickles only, which torch reads without running what is in them.
    options |= {"use_safetensors": True if is_local else None, "local_files_only": is_local}
    with told(f"the model in {name_or_path}" if is_local else f"the model {name_or_path}"):
        try:
            model, info = auto_class.from_pretrained(name_or_path, **options)
        except KeyError as error:
            if is_local and (field := _field_of(Path(name_or_path), error.args[0] if error.args else None)):
                raise ConfigError(f"{name_or_path}/config.json: {field} is nothing that transformers knows") from error
            raise
        except RuntimeError as error:
            if "ignore_mismatched_sizes" in str(error):
                _, info = auto_class.from_pretrained(name_or_path, ignore_mismatched_sizes=True, **options)
                raise ConfigError(_mismatch(str(name_or_path), info)) from error
            raise
    lacking = sorted(set(info["missing_keys"]) - set(may_lack))
    if lacking:
        raise ConfigError(
            f"{name_or_path}: its files lack {len(lacking)} of the weights of {type(model).__name__}, such as "
            f"{lacking[0]}: they would be random"
        )
    return model


def _mismatch(name: str, info: dict[str, Any]) -> str:
    """Which of the weights have other shapes than config.json says."""
    wrong = sorted(info["mismatched_keys"])
    shapes = [f"{key} is {[*stored]}, but config.json makes it {[*made]}" for key, stored, made in wrong[:1]]
    return f"{name}: {len(wrong)} of its weights have other shapes than config.json says: {''.join(shapes)}"


def _field_of(directory: Path, value: object, entries: Any = None) -> str | None:
    """The field of config.json that is a value which a library has no entry for, as `FIELD='VALUE'`."""
    entries = read_object(directory / "config.json") if entries is None else entries
    for name, entry in entries.items():
        if isinstance(value, str) and entry == value:
            return f"{name}={value[:80]!r}"
        if isinstance(entry, dict) and (found := _field_of(directory, value, entry)):
            return f"{name}.{found}"
    return None


def check_weights(model: Any, name: str | Path) -> None:
    """Raise ConfigError if a model's weights are not all numbers."""
    for key, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise ConfigError(f"{name}: the weights {key} hold NaN or infinity: the files are damaged")


def check_tokenizer(
    directory: Path, *, cache_dir: Path, chat_template: str | None = None, name: str | Path | None = None
) -> None:
    """Try a tokenizer with the chat template in force in a short-lived process; raises ConfigError if that goes wrong.

    A crash in native code, or a template that never ends, then harms nothing else. What went well is noted in
    `cache_dir`, so that the same files are tried once.

    Args:
        directory: with the tokenizer's files.
        cache_dir: where the note is left; one that cannot be written costs another trial.
        chat_template: what is used in place of the directory's own.
        name: what messages call the directory.
    """
    check_tokenizer_files(directory)
    versions = [metadata.version(package) for package in ("transformers", "tokenizers", "jinja2")]
    marker = cache_dir / "models" / f"tried-{digest([files_digest(directory), chat_template, *versions])}"
    if marker.is_file():
        return
    step, code, error = _tried(directory, chat_template)
    if not code:
        with contextlib.suppress(OSError):
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()
        return
    _, _, turns = step.partition("template ")
    place = f" on a conversation of {turns} message{'' if turns == '1' else 's'}" if turns else ""
    if code > 0 and error.startswith(str(directory)):
        raise ConfigError(error)  # One of `load_tokenizer`, which says all that there is to say.
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        why = f"it takes more than {CPU_SECONDS} seconds" if step == "load" else f"it does not come to an end{place}"
    elif code < 0:
        why = f"native code crashes over it ({signal.Signals(-code).name})"
    else:
        why = error[:300] or f"the process that tried it ended with {code}"
    what = "tokenizer of" if not place else "chat template that is given for" if chat_template else "chat template of"
    raise ConfigError(f"the {what} {name or directory} cannot be used: {why}")


def _tried(directory: Path, chat_template: str | None) -> tuple[str, int, str]:
    """The step that the trial had come to, its exit code, and the last line that it wrote of an error."""
    # The package may be found from launch.py's directory only.
    path = os.pathsep.join(filter(None, (PROJECT, os.environ.get("PYTHONPATH"))))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "rlhf.models.trial", str(directory)],
            input=(chat_template or "").encode("utf-8", "surrogatepass"),
            capture_output=True,
            timeout=WALL_SECONDS,
            check=False,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path},
            preexec_fn=_limit,
        )
        output, code, error = done.stdout, done.returncode, done.stderr
    except subprocess.TimeoutExpired as expired:
        output, code, error = expired.stdout or b"", -signal.SIGKILL, b""
    step, line = (text.decode(errors="replace").strip().rpartition("\n")[2] for text in (output, error))
    return step, code, line


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 60))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def digest(parts: Sequence[object]) -> str:
    """16 letters that stand for what some objects are as texts."""
    return hashlib.blake2b(json.dumps([str(part) for part in parts]).encode(), digest_size=8).hexdigest()


def files_digest(directory: Path) -> str:
    """The same for the files of a tokenizer."""
    files = [directory / name for name in _TOKENIZER_FILES]
    return digest([(file.name, hashlib.blake2b(file.read_bytes()).hexdigest()) for file in files if file.is_file()])
