"""Times on a GPU: what a step costs the device, what it costs the host, and what a loop of steps takes."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

#: bytes written between two timed steps: more than any second-level cache holds
FLUSH = 256 << 20
#: cycles per second that `torch.cuda._sleep` counts, at most
CLOCK = 2.0e9

Step = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Milliseconds per step, each the 20th, 50th and 80th percentile over rounds.

    Attributes:
        device: between the first and the last instruction on the device, with cold caches; the host is ahead.
        loop: of a loop that does nothing else, host and device side by side.
        host: until the host could go on, in that loop.
    """

    device: tuple[float, float, float]
    loop: tuple[float, float, float]
    host: tuple[float, float, float]


def time_interleaved(steps: Mapping[str, Step], interval: int, rounds: int, seconds: float = 25.0) -> dict[str, Timing]:
    """Times of several steps, round by round, so that what disturbs one disturbs all.

    Args:
        interval: steps of a round, of which one may allocate ranks.
        seconds: no round begins later, but for the first three.
    """
    found: dict[str, tuple[list[float], list[float], list[float]]] = {name: ([], [], []) for name in steps}
    cache = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")
    begin = time.monotonic()
    for number in range(rounds):
        if number >= 3 and time.monotonic() - begin > seconds:
            break
        for name, step in steps.items():
            loop, host = _loop(step, interval)
            device = _device(step, interval, host, cache)
            for times, value in zip(found[name], (device, loop, host), strict=True):
                times.append(value)
    return {name: Timing(*map(_percentiles, times)) for name, times in found.items()}


def _loop(step: Step, interval: int) -> tuple[float, float]:
    torch.cuda.synchronize()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin = time.perf_counter()
    start.record()
    for _ in range(interval):
        step()
    stop.record()
    host = (time.perf_counter() - begin) * 1e3 / interval
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / interval, host


def _device(step: Step, interval: int, host: float, cache: torch.Tensor) -> float:
    cycles, events = int(1.5e-3 * host * CLOCK) + 200_000, []
    for _ in range(interval):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        cache.zero_()
        torch.cuda._sleep(cycles)  # meanwhile the host gives the device all launches of the step
        start.record()
        step()
        stop.record()
        events.append((start, stop))
    torch.cuda.synchronize()
    return statistics.mean(start.elapsed_time(stop) for start, stop in events)


def _percentiles(values: list[float]) -> tuple[float, float, float]:
    deciles = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else values * 9
    return deciles[1], deciles[4], deciles[7]


def copy_bandwidth() -> float:
    """GB/s of device copies of 1 GiB, what is read and what is written counted: the ceiling of a step."""
    source = torch.empty(1 << 28, device="cuda")
    target = torch.empty_like(source)
    (timing,) = time_interleaved({"copy": lambda: target.copy_(source)}, interval=10, rounds=10).values()
    return 2 * source.numel() * 4 / timing.loop[1] / 1e6


def count_launches(step: Step) -> int | None:
    """Kernels that one step runs; copies of small tables are not kernels. None where the profiler sees nothing."""
    if torch.profiler.ProfilerActivity.CUDA not in torch.profiler.supported_activities():
        step()
        return None
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if str(e.device_type).endswith("CUDA")]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in names) or None


def waits_for_device(step: Step) -> bool:
    """Whether a step makes the host wait for the device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        except RuntimeError:
            return True
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return False
