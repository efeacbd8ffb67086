"""Where and with what a number was measured, and how much memory a call needs."""

from __future__ import annotations

import ctypes
import datetime
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def describe_machine() -> str:
    """Number and model of the processors, e.g. "2 CPU AMD EPYC 7B13"."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} CPU {models[0] if models else platform.processor() or platform.machine()}"


def describe_commit(root: Path = ROOT) -> str:
    """Short hash of the checkout, with "+dirty" when code that matters differs from it; empty without git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True).stdout

    try:
        head = git("rev-parse", "--short", "HEAD").strip()
        code = ("ivon_lora", "kernels", "benchmarks/*.py")
        return head + ("+dirty" if git("status", "--porcelain", "--untracked-files=no", "--", *code) else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def provenance() -> dict[str, str]:
    """The columns that every file of results ends with."""
    return {
        "torch": torch.__version__,
        "machine": describe_machine(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": describe_commit(),
    }


def peak_extra_mib(call: Callable[[], object]) -> float | None:
    """Largest resident memory during ``call()`` minus that before it, in MiB, good to about 1 MiB.

    Whoever allocates (torch, numpy), every page counts, and so does what the call keeps. ``call`` runs in any case;
    None where Linux with glibc does not tell.
    """
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # or temporaries would hide in free pages
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from the present
        before = _resident("VmRSS")
    except (OSError, AttributeError):
        call()
        return None
    call()
    return max(0, _resident("VmHWM") - before) / 1024


def _resident(field: str) -> int:
    """A line of /proc/self/status in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0])
    raise OSError(f"/proc/self/status has no {field}")
