"""Decoding's compiled part for CPUs: built once by this machine's C++ compiler, kept, and loaded."""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock

SOURCES = Path(__file__).parent / "kernel"
FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-fopenmp",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
)
SECONDS = 600  # That the compiler may take; it takes about fifteen.


class NotCompiledError(Exception):
    """There is no compiled part on this machine; the message says why."""


@cache
def load_library() -> ctypes.CDLL:
    """The functions of kernel/decode.cpp.

    Raises:
        NotCompiledError: no compiler, or one that cannot be used.
    """
    if not sys.platform.startswith("linux"):
        raise NotCompiledError("it is built on Linux only")
    command = _compiler()
    macros = _run([*command, *FLAGS, "-dM", "-E", "-x", "c++", os.devnull])
    if "__clang__" in macros:
        raise NotCompiledError("clang's OpenMP would run threads beside torch's: it takes g++")
    sources = sorted(SOURCES.glob("*.*"))
    # Its threads are torch's own: both use one OpenMP library.
    openmp = [str(path) for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))]
    # The macros say which instructions this CPU has: a home directory may serve several machines.
    facts = [*command, *FLAGS, *openmp, macros, *(path.read_text(encoding="utf-8") for path in sources)]
    digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
    try:
        directory = Path(os.environ.get("RLHF_CACHE") or "~/.cache/rlhf").expanduser() / "compiled"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        built = directory / f"decode-{digest}.so"
        with FileLock(f"{built}.lock"):
            if not built.exists():
                _build([*command, *FLAGS, "-shared", "-fPIC", str(SOURCES / "decode.cpp"), *openmp], built)
        library = ctypes.CDLL(str(built))
    except (OSError, RuntimeError) as error:  # No home directory is a RuntimeError.
        raise NotCompiledError(str(error)) from None
    library.decode_kind.restype = library.decode_bytes.restype = ctypes.c_int64
    library.decode_blocks.restype = library.decode_product.restype = None
    return library


def _compiler() -> list[str]:
    command = shlex.split(os.environ.get("CXX") or "g++")
    if not command or shutil.which(command[0]) is None:
        raise NotCompiledError(f"no C++ compiler {' '.join(command)} (CXX names another)")
    return command


def _build(command: list[str], target: Path) -> None:
    """Compile beside the target and then rename: a process that is killed leaves nothing that looks whole."""
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        made = Path(directory) / target.name
        _run([*command, "-o", str(made)])
        os.replace(made, target)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotCompiledError(str(error)) from None
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()[-1:]
        said = errors[0] if errors else f"exit code {done.returncode}"
        raise NotCompiledError(f"{command[0]}: {said}")
    return done.stdout
