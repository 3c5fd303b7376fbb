"""Decoding's compiled part for CPUs: built once by this machine's C++ compiler, kept, and loaded."""

import ctypes
import hashlib
import os
import shlex
import shutil
import signal
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
SECONDS = 120  # That the compiler may take; it takes about ten.


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
    try:
        library = ctypes.CDLL(str(_built()))
        library.decode_kind.restype = library.decode_bytes.restype = ctypes.c_int64
        library.decode_blocks.restype = library.decode_product.restype = None
    except (OSError, RuntimeError, ValueError, AttributeError) as error:  # No home directory is a RuntimeError.
        raise NotCompiledError(f"{type(error).__name__}: {error}") from None
    return library


def _built() -> Path:
    """The compiled file, made now if there is none for this text, compiler and CPU."""
    command = shlex.split(os.environ.get("CXX") or "g++")
    if not command or shutil.which(command[0]) is None:
        raise NotCompiledError(f"no C++ compiler {' '.join(command)} (CXX names another)")
    macros = _run([*command, *FLAGS, "-dM", "-E", "-x", "c++", os.devnull])
    if "__clang__" in macros:
        raise NotCompiledError("clang's OpenMP would run threads beside torch's: it takes g++")
    # Its threads are torch's own: both use one OpenMP library.
    openmp = [str(path) for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))]
    texts = [(SOURCES / name).read_text(encoding="utf-8") for name in ("decode.cpp", "numbers.h", "products.h")]
    # The macros say which instructions this CPU has: a home directory may serve several machines.
    digest = hashlib.sha256("\n".join([*command, *FLAGS, *openmp, macros, *texts]).encode()).hexdigest()[:16]
    built = _directory() / f"decode-{digest}.so"
    if not built.exists():
        with FileLock(f"{built}.lock", timeout=2 * SECONDS):  # A timeout is an OSError.
            if not built.exists():
                _build([*command, *FLAGS, "-shared", "-fPIC", str(SOURCES / "decode.cpp"), *openmp], built)
    return built


def _directory() -> Path:
    """This user's own: what lies there is run."""
    cache_directory = Path(os.environ.get("RLHF_CACHE") or "~/.cache/rlhf").expanduser()
    directory = cache_directory / f"compiled-{os.getuid()}"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    facts = directory.lstat()
    if facts.st_uid != os.getuid() or facts.st_mode & 0o022:
        raise NotCompiledError(f"others may write to {directory}: chmod go-w it, or remove it")
    return directory


def _build(command: list[str], target: Path) -> None:
    """Compile beside the target and then rename: a process that is killed leaves nothing that looks whole."""
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        made = Path(directory) / target.name
        _run([*command, "-o", str(made)])
        with made.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(made, target)


def _run(command: list[str]) -> str:
    """What a command says; at its end, or if it takes too long, nothing of it is left running."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            said, errors = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise NotCompiledError(f"{command[0]} took more than {SECONDS} seconds") from None
    if process.returncode:
        lines = [line for line in errors.splitlines() if "error" in line] or errors.splitlines()[-1:]
        raise NotCompiledError(f"{command[0]}: {lines[0] if lines else f'exit code {process.returncode}'}")
    return said
