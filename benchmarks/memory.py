"""Peak memory of a step as the operating system sees it: whoever allocates (torch, numpy), every page counts.

    python -m benchmarks.memory minilm-lora-r8 eager    # prints JSON: peer -> bytes

Each case runs in a process of its own (`peaks`) in which glibc's malloc maps every large block by itself and unmaps it
when it is freed. Otherwise the peak would also hold what malloc keeps for later, which depends on all that ran before.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.cases import CASES, QUICK_CASES, Case
from benchmarks.machine import ROOT, malloc_environment
from benchmarks.measure import WARMUP
from benchmarks.peers import Peer, make_peers

MAP_EVERYTHING = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def peaks(case: Case, backends: Sequence[str]) -> dict[str, int]:
    """Bytes a step needs at its peak beyond what is there before it, by peer; nothing where the system does not tell.

    Raises:
        subprocess.CalledProcessError: the measuring process failed.
    """
    environment = malloc_environment("default", os.environ) | MAP_EVERYTHING
    command = [sys.executable, "-m", "benchmarks.memory", case.name, *backends]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def peaks_of(case: Case, backends: Sequence[str]) -> dict[str, int]:
    """Peer -> bytes, measured in this process."""
    found = {}
    for peer in make_peers(case, WARMUP + 2, backends):
        for _ in range(WARMUP):
            peer.step()
        peak = _peak_of_step(peer)
        if peak is not None:
            found[peer.name] = peak
    return found


def _peak_of_step(peer: Peer) -> int | None:
    """The larger peak of a step with and one without an allocation of ranks."""
    gc.collect()  # garbage of earlier steps must not make room for this one
    steps = [peak_extra_bytes(peer.step) for _ in range(1 if peer.allocates_next is None else 2)]
    return None if None in steps else max(step for step in steps if step is not None)


def peak_extra_bytes(call: Callable[[], None]) -> int | None:
    """Largest resident memory during ``call()`` minus that before it, in bytes, good to about 1 MiB.

    What the call keeps also counts. ``call`` runs in any case; None where Linux with glibc does not tell.
    """
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # or temporaries would hide in free pages
        _CLEAR.write_text("5")  # the peak starts again from the present
        before = _resident("VmRSS")
    except (OSError, AttributeError):
        call()
        return None
    call()
    return max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"{_STATUS} has no {field}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    known = {case.name: case for case in (*CASES, *QUICK_CASES)}
    print(json.dumps(peaks_of(known[sys.argv[1]], sys.argv[2:])))
