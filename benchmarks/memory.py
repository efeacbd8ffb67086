"""Peak memory of a call as the operating system sees it: whoever allocates (torch, numpy), every page counts."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def peak_extra_bytes(call: Callable[[], None]) -> int | None:
    """Largest resident memory during ``call()`` minus that before it, in bytes, good to about 1 MiB.

    Free pages are first given back to the kernel; otherwise temporaries would hide in them. What the call keeps also
    counts. ``call`` runs in any case; None where Linux with glibc does not tell.
    """
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
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
