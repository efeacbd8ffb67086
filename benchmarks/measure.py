"""Time the peers of one case round by round in one process, so that a disturbance of the machine meets all of them."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.peers import INTERVAL, Peer

#: untimed steps at the start: they create the state
WARMUP = 2


@dataclass(frozen=True)
class Cost:
    """Milliseconds of one step: by the clock, and of processor time of all threads, which others hardly change."""

    wall_ms: float
    cpu_ms: float


def steps_needed(rounds: int) -> int:
    """Steps that :func:`interleave` does with a peer, at most."""
    return WARMUP + 2 * rounds


def interleave(peers: Sequence[Peer], rounds: int) -> dict[str, list[Cost]]:
    """Cost of a step of every peer, once per round; the order within a round is shuffled."""
    for peer in peers:
        for _ in range(WARMUP):
            peer.step()
    order = random.Random(0)
    costs: dict[str, list[Cost]] = {peer.name: [] for peer in peers}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for peer in order.sample(list(peers), len(peers)):
                costs[peer.name].append(cost_of_step(peer))
    finally:
        gc.enable()
    for peer in peers:
        if not all(bool(torch.isfinite(p).all()) for p in peer.tensors):
            raise RuntimeError(f"{peer.name} ended with parameters that are not finite: its times mean nothing")
    return costs


def cost_of_step(peer: Peer) -> Cost:
    """Cost of one step; of a peer that allocates ranks, the mean over an interval of `INTERVAL` steps.

    Such a peer does one step of each kind, and the one with the allocation counts once per interval.
    """
    if peer.allocates_next is None:
        return _cost(peer.step)
    if peer.allocates_next():
        raise RuntimeError(f"{peer.name} is out of step with its schedule")
    plain = _cost(peer.step)
    if not peer.allocates_next():
        raise RuntimeError(f"{peer.name} is out of step with its schedule")
    due = _cost(peer.step)
    return Cost(
        wall_ms=((INTERVAL - 1) * plain.wall_ms + due.wall_ms) / INTERVAL,
        cpu_ms=((INTERVAL - 1) * plain.cpu_ms + due.cpu_ms) / INTERVAL,
    )


def _cost(call: Callable[[], None]) -> Cost:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Cost((time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3)
