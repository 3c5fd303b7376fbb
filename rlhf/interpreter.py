"""Whether the Python that runs has what is needed, told in one message; written for every Python 3, with no package."""

import importlib.util
import os
import shlex
import sys

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OLDEST = (3, 11)
# The first of the packages that pyproject.toml requires, by the modules that are imported.
LAUNCHING = ("hydra", "omegaconf", "yaml")
TALKING = ("torch", "transformers", "jinja2")


def require(program: str, modules: "tuple[str, ...]") -> None:
    """End with exit code 2 where this interpreter is too old or lacks some of the modules; name the one to use."""
    lacking = [name for name in modules if importlib.util.find_spec(name) is None]
    if sys.version_info >= OLDEST and not lacking:
        return
    reason = f"lacks {', '.join(lacking)}" if lacking else "is too old: 3.11 or newer is needed"
    here = os.path.abspath(sys.executable or "python3")
    version = ".".join(str(part) for part in sys.version_info[:3])
    own = os.path.join(PROJECT, ".venv", "bin", "python")
    if os.path.exists(own) and own != here:
        words = list(getattr(sys, "orig_argv", [here, *sys.argv]))[1:]
        command = " ".join(shlex.quote(word) for word in [os.path.relpath(own), *words])
        advice = f"use the project's environment:  {command}"
    else:
        advice = f"install the packages:  make -C {shlex.quote(PROJECT)} .venv/installed"
    print(f"{program}: {here} (Python {version}) {reason}: {advice}", file=sys.stderr)
    sys.exit(2)


def talk_command(run_dir: str) -> str:
    """The command that talks to a run's model, for the shell that launch.py was started in."""
    import importlib.metadata  # Not in a Python that is too old, which this module has to tell.

    words = [_short_path(sys.executable or "python3"), "-m", "rlhf.chat", _short_path(run_dir)]
    # Where the package is not installed, it is found from the project's directory only.
    project = os.path.realpath(PROJECT)
    elsewhere = [place for place in sys.path if os.path.realpath(place or ".") != project]
    installed = any(True for _ in importlib.metadata.distributions(name="rlhf", path=elsewhere))
    prefix = "" if installed or os.getcwd() == project else f"PYTHONPATH={shlex.quote(project)} "
    return prefix + shlex.join(words)


def _short_path(path: str) -> str:
    """A path below the working directory as seen from there, every other as it is."""
    inside = os.path.relpath(path)
    return path if inside.startswith(("..", "-")) else inside if os.sep in inside else os.path.join(".", inside)
