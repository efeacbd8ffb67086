"""Find the C++ compiler of this machine, compile a source file to a function, and keep the result on disk."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)

#: tried in this order where the variable CXX does not name one
COMPILERS = ("g++", "clang++", "c++")

# Every operation must round on its own, as in numpy: nothing that allows the compiler to contract or to re-associate.
# Floating-point traps and errno, which nobody reads here, would only keep it from using vector instructions.
_FLAGS = ["-O3", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fwrapv"]
_FLAGS += ["-shared", "-fPIC", "-w"]
_TARGETS: tuple[list[str], ...] = (
    ["-march=native"],
    ["-mcpu=native"],
    [],
)  # not every compiler knows the first one on every processor


def find_compiler() -> list[str]:
    """The command that starts the C++ compiler: the variable CXX, or the first of `COMPILERS` in PATH.

    Raises:
        ValueError: there is none.
    """
    wanted = shlex.split(os.environ.get("CXX", ""))
    for command in [wanted] if wanted else [[name] for name in COMPILERS]:
        if path := shutil.which(command[0]):
            return [path, *command[1:]]
    tried = f"CXX={os.environ['CXX']!r} is not there" if wanted else f"none of {', '.join(COMPILERS)} is in PATH"
    raise ValueError(
        f"needs a C++ compiler, and {tried}; install one (Debian: apt install g++; macOS: xcode-select --install) "
        "or set CXX"
    )


def cache_folder() -> Path:
    """Where compiled functions are kept: IVON_LORA_CACHE, or ``ivon_lora`` in the user's folder of caches.

    A folder of this process alone where that cannot be written.
    """
    try:
        default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ivon_lora"
        folder = Path(os.environ.get("IVON_LORA_CACHE") or default)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        pass
    return _private_folder()


@functools.cache
def _private_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="ivon_lora_"))


@functools.cache
def compile_function(
    source: str, about: str, flags: tuple[str, ...] = (), holds_lock: bool = False
) -> Callable[..., int]:
    """Compile C++ source that defines ``int64_t run(...)`` with arguments that are addresses or int64.

    Args:
        source: the source.
        about: what it does, for the user who waits.
        flags: further flags of the compiler, which may name libraries.
        holds_lock: it looks at Python's objects, and keeps the interpreter lock.

    Returns:
        the function, which takes Python integers.

    Raises:
        ValueError: there is no compiler, or it fails; with its message.
    """
    compiler = find_compiler()
    library = cache_folder() / f"{_fingerprint(source, [*compiler, *flags])}.so"
    if library.exists():
        try:
            return _load(library, holds_lock)
        except OSError:  # damaged, or of another system that shares the folder
            logger.info("%s cannot be loaded and is compiled again", library)
    print(f"ivon-lora: compiling {about} for this CPU, once (kept in {library.parent})", file=sys.stderr)
    start = time.perf_counter()
    _compile(source, compiler, library, flags)
    logger.info("compiled %s in %.1f s with %s", about, time.perf_counter() - start, compiler[0])
    try:
        return _load(library, holds_lock)
    except OSError as error:
        raise ValueError(f"{compiler[0]} compiled {about}, but the result cannot be loaded: {error}") from error


def _compile(source: str, compiler: list[str], library: Path, flags: tuple[str, ...]) -> None:
    message = ""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:  # the same file system: replacing is atomic
        file, result = Path(folder) / "loop.cpp", Path(folder) / "loop.so"
        file.write_text(source)
        for target in _TARGETS:
            try:
                command = [*compiler, *_FLAGS, *target, "-o", str(result), str(file), *flags]
                run = subprocess.run(command, capture_output=True, text=True)
            except OSError as error:
                raise ValueError(f"the C++ compiler {compiler[0]} does not start: {error}") from error
            if run.returncode == 0 and result.exists():
                os.replace(result, library)
                return
            message = message or run.stderr.strip()
    message = message or f"exit status {run.returncode}"
    raise ValueError(f"the C++ compiler {shlex.join(compiler)} fails:\n{message[:2000]}")


def _load(library: Path, holds_lock: bool) -> Callable[..., int]:
    function = (ctypes.PyDLL if holds_lock else ctypes.CDLL)(str(library)).run
    function.restype = ctypes.c_int64
    function.argtypes = [ctypes.c_int64] * 6
    return function


def _fingerprint(source: str, compiler: list[str]) -> str:
    """Changes with all that the result depends on: source, compiler, flags and the instructions of the processor."""
    binary = os.stat(compiler[0])
    parts = [source, *compiler, str(binary.st_size), str(binary.st_mtime_ns), *_FLAGS, platform.platform(), _cpu()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    about = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(sorted({line for line in lines if line.split("\t")[0].split(":")[0].strip() in about}))
