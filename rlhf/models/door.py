"""The one door to what a user names: a model's configuration, weights and tokenizer, from a directory or the hub.

Files are looked at first (`rlhf.config.model_directory`); what a library still finds wrong becomes one message. No code
of a model is ever run. Imports no torch by itself.
"""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf.config.errors import ConfigError
from rlhf.config.model_directory import check_directory, check_tokenizer_files
from rlhf.interpreter import PROJECT

CPU_SECONDS, WALL_SECONDS, MEMORY = 60, 300, 16 * 2**30
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
    """The first line of what an error says, with its kind where the message alone says little."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    message = lines[0][:300] if lines else ""
    plain = isinstance(error, OSError | ValueError) and not isinstance(error, UnicodeError) and len(message) > 20
    return (
        message
        if plain or (type(error) is Exception and message)
        else f"{type(error).__name__}: {message}".rstrip(": ")
    )


def load_config(name_or_path: str | Path, *, revision: str | None = None, **entries: Any) -> Any:
    """A model's configuration (a transformers PreTrainedConfig); raises ConfigError."""
    from transformers import AutoConfig

    if Path(name_or_path).is_dir():
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
    is_local = Path(name_or_path).is_dir()
    if is_local:
        check_directory(Path(name_or_path))
    with told(f"the model in {name_or_path}" if is_local else f"the model {name_or_path}"):
        model, info = auto_class.from_pretrained(
            name_or_path,
            revision=revision,
            trust_remote_code=False,
            output_loading_info=True,
            # The hub's OPT models are pickles only, which torch reads without running what is in them.
            use_safetensors=True if is_local else None,
            local_files_only=is_local,
            **options,
        )
    lacking = sorted(set(info["missing_keys"]) - set(may_lack))
    if lacking:
        raise ConfigError(
            f"{name_or_path}: its files lack {len(lacking)} of the weights of {type(model).__name__}, such as "
            f"{lacking[0]}: they would be random"
        )
    return model


def check_tokenizer(directory: Path, *, marker: Path) -> None:
    """Try a directory's tokenizer and chat template in a short-lived process; raises ConfigError if that goes wrong.

    A crash in native code, or a template that never ends, then harms nothing else. `marker` is left where it went
    well, so that the same files are tried once.
    """
    check_tokenizer_files(directory)
    if marker.is_file():
        return
    command = [sys.executable, "-m", "rlhf.models.trial", str(directory)]
    # The package may be found from launch.py's directory only.
    path = os.pathsep.join(filter(None, (PROJECT, os.environ.get("PYTHONPATH"))))
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=WALL_SECONDS,
            check=False,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path},
            preexec_fn=_limit,
        )
        step, code = done.stdout.strip().rpartition("\n")[2], done.returncode
        error = done.stderr.strip().rpartition("\n")[2]
    except subprocess.TimeoutExpired as expired:
        step, code, error = (expired.stdout or b"").decode(errors="replace").strip().rpartition("\n")[2], -9, ""
    if not code:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
        return
    what = "chat template" if step == "template" else "tokenizer"
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        why = "it does not come to an end" if step == "template" else f"it takes more than {CPU_SECONDS} seconds"
    elif code < 0:
        why = f"native code crashes over it ({signal.Signals(-code).name})"
    else:
        why = error[:300] or f"the process that tried it ended with {code}"
    raise ConfigError(f"the {what} of {directory} cannot be used: {why}")


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
