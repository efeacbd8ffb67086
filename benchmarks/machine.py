"""Where and with what a measurement was made: machine, commit, and glibc's memory allocator."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

#: glibc keeps what is freed; by default every large temporary is mapped, faulted in and unmapped again
TUNED_MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "1000000000",
}
MALLOCS = ("default", "tuned")


def malloc_environment(setting: str, environ: Mapping[str, str]) -> dict[str, str]:
    """``environ`` as it must be when the process starts, for one of `MALLOCS`.

    Raises:
        ValueError: an unknown setting, or "tuned" without glibc.
    """
    if setting not in MALLOCS:
        raise ValueError(f"--malloc must be one or several of {', '.join(MALLOCS)}, got {setting!r}")
    if setting == "tuned" and platform.libc_ver()[0] != "glibc":
        raise ValueError(
            "--malloc tuned sets variables of glibc, which this Python does not use: take --malloc default"
        )
    plain = {
        name: value for name, value in environ.items() if not name.startswith("MALLOC_") and name != "GLIBC_TUNABLES"
    }
    return plain | TUNED_MALLOC if setting == "tuned" else plain


def describe_machine(note: str = "", cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Number and model of the processors, e.g. "2 vCPU AMD EPYC, shared" with the note "shared"."""
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    entries = dict(
        reversed(
            [(name.strip(), value.strip()) for name, _, value in (line.partition(":") for line in text.splitlines())]
        )
    )
    model = entries.get("model name") or platform.processor() or platform.machine()
    unit = "vCPU" if "hypervisor" in entries.get("flags", "").split() else "CPU"
    return f"{os.cpu_count()} {unit} {model}" + (f", {note}" if note else "")


def describe_commit(root: Path = ROOT) -> str:
    """Short hash of the checkout, with "+dirty" when files that matter differ from it; empty without git."""
    try:
        head = _git(root, "rev-parse", "--short", "HEAD")
        dirty = _git(
            root, "status", "--porcelain", "--untracked-files=no", "--", "ivon_lora", "kernels", "benchmarks/*.py"
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("+dirty" if dirty else "")


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()
