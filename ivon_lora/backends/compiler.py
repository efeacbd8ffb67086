"""Compile one C++ file with the compiler of this machine, and keep the library on disk."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.cpp")

#: tried in this order where the variable CXX does not name one
COMPILERS = ("g++", "clang++", "c++")

# Every operation must round on its own, as in numpy: nothing that allows the compiler to contract or to re-associate.
# Floating-point traps and errno, which nobody reads here, would only keep it from using vector instructions.
FLAGS = (
    *("-O3", "-std=c++17", "-shared", "-fPIC", "-fwrapv"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)

#: the first that the compiler knows
TARGETS = (("-march=native",), ("-mcpu=native",), ())


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled `kernels.cpp`, which takes two seconds the first time on a machine.

    Raises:
        ValueError: there is no compiler, or it fails; with its message.
    """
    compiler = _find_compiler()
    folder, name = _cache_folder(), _fingerprint(compiler)
    for path in folder.glob(f"{name}-*.so"):
        if _belongs_to_us(path) and path.stem == f"{name}-{_digest(path)}":  # a damaged one would crash
            try:
                return ctypes.CDLL(str(path))
            except OSError as error:  # of another system that shares the folder
                logger.info("%s cannot be loaded and is compiled again: %s", path, error)
    path = _compile(compiler, folder, name)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise ValueError(f"what {compiler[0]} compiled cannot be loaded: {error}") from error


def why_not() -> str | None:
    """Why there is no compiled library; None if there is one."""
    try:
        library()
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _find_compiler() -> list[str]:
    """The command that starts the C++ compiler: the variable CXX, or the first of `COMPILERS` in PATH."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    for command in [wanted] if wanted else [[name] for name in COMPILERS]:
        if path := shutil.which(command[0]):
            return [path, *command[1:]]
    tried = f"CXX={os.environ['CXX']!r} is not there" if wanted else f"none of {', '.join(COMPILERS)} is in PATH"
    raise ValueError(
        f"needs a C++ compiler, and {tried}; install one (Debian: apt install g++; macOS: xcode-select --install) "
        "or set CXX"
    )


def _cache_folder() -> Path:
    """IVON_LORA_CACHE, or ``ivon_lora`` in the user's folder of caches; a folder of this process where that is unsafe.

    Code is loaded from there, so nobody but the user may be able to write it.
    """
    try:
        default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ivon_lora"
        folder = Path(os.environ.get("IVON_LORA_CACHE") or default)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK) and _belongs_to_us(folder):
            return folder
        logger.warning("%s can be written by others: compiled code is not kept there", folder)
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        pass
    return _private_folder()


@functools.cache
def _private_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="ivon_lora_"))


def _belongs_to_us(path: Path) -> bool:
    """Whether only this user can write it."""
    about = path.stat()
    return about.st_uid == os.getuid() and not about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def _compile(compiler: list[str], folder: Path, name: str) -> Path:
    """The new library, whose name ends with the digest of its content."""
    message = ""
    logger.info("compiling the CPU kernels for this machine, once (kept in %s)", folder)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:  # the same file system: replacing is atomic
        result = Path(temporary) / "kernels.so"
        for target in TARGETS:
            command = [*compiler, *FLAGS, *target, "-o", str(result), str(SOURCE)]
            try:
                done = subprocess.run(command, capture_output=True, text=True)
            except OSError as error:
                raise ValueError(f"the C++ compiler {compiler[0]} does not start: {error}") from error
            if done.returncode == 0 and result.exists():
                result.chmod(0o700)
                return result.replace(folder / f"{name}-{_digest(result)}.so")
            message = message or done.stderr.strip() or f"exit status {done.returncode}"
    raise ValueError(f"the C++ compiler {shlex.join(compiler)} fails:\n{message[:2000]}")


def _fingerprint(compiler: list[str]) -> str:
    """Changes with all that the result depends on: source, compiler, flags and the instructions of the processor."""
    binary = os.stat(compiler[0])
    parts = [SOURCE.read_text(), *compiler, str(binary.st_size), str(binary.st_mtime_ns), *FLAGS]
    return hashlib.sha256("\0".join([*parts, platform.platform(), _cpu()]).encode()).hexdigest()[:32]


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    about = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(sorted({line for line in lines if line.split("\t")[0].split(":")[0].strip() in about}))
