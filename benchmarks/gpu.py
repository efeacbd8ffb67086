"""Times on a GPU: what a step costs the device, what it costs the host, and what a loop of steps takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

#: bytes written between two timed steps: more than any second-level cache holds
FLUSH = 256 << 20
#: cycles per second that `torch.cuda._sleep` counts, at most
CLOCK = 2.0e9


@dataclass(frozen=True)
class Timing:
    """Milliseconds per step.

    Attributes:
        device_ms: between the first and the last instruction on the device, with cold caches; the host is ahead.
        device_p20_ms, device_p80_ms: percentiles of it over rounds.
        elapsed_ms: of a loop that does nothing else, host and device side by side.
        host_ms: until the host could go on, in that loop.
    """

    device_ms: float
    device_p20_ms: float
    device_p80_ms: float
    elapsed_ms: float
    host_ms: float


def time_steps(step: Callable[[], Any], interval: int, rounds: int) -> Timing:
    """Times of ``step``; each round is an interval of steps, of which one may allocate ranks."""
    elapsed, host = loop_times(step, interval, rounds)
    cache = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")
    cycles = int(1.5e-3 * host * CLOCK) + 200_000
    device = []
    for _ in range(rounds):
        events = []
        for _ in range(interval):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            cache.zero_()
            torch.cuda._sleep(cycles)  # meanwhile the host gives the device all launches of the step
            start.record()
            step()
            stop.record()
            events.append((start, stop))
        torch.cuda.synchronize()
        device.append(statistics.mean(start.elapsed_time(stop) for start, stop in events))
    deciles = statistics.quantiles(device, n=10, method="inclusive") if len(device) > 1 else [device[0]] * 9
    return Timing(statistics.median(device), deciles[1], deciles[7], elapsed, host)


def loop_times(step: Callable[[], Any], interval: int, rounds: int) -> tuple[float, float]:
    """Medians over rounds of elapsed and host milliseconds per step, steps following each other without a pause."""
    elapsed, host = [], []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin = time.perf_counter()
        start.record()
        for _ in range(interval):
            step()
        stop.record()
        host.append((time.perf_counter() - begin) * 1e3 / interval)
        torch.cuda.synchronize()
        elapsed.append(start.elapsed_time(stop) / interval)
    return statistics.median(elapsed), statistics.median(host)


def copy_bandwidth() -> float:
    """GB/s of device copies of 1 GiB, what is read and what is written counted: the ceiling of a step."""
    source = torch.empty(1 << 28, device="cuda")
    target = torch.empty_like(source)
    elapsed, _ = loop_times(lambda: target.copy_(source), interval=10, rounds=10)
    return 2 * source.numel() * 4 / elapsed / 1e6


def count_launches(step: Callable[[], Any]) -> int | None:
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
