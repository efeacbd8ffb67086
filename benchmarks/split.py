"""Where the time of one IVON step goes: noise, sample, step, scores, selection, bookkeeping.

    python -m benchmarks.split                          # every backend and adapter: about a minute

Processor time on one thread. The calls of a real step are timed where they happen; the noise is what a step costs more
when it has to draw it again (`noise_store.LIMIT` of 0) than when it finds it. Scores and selection are those of one
allocation, divided by the interval of 10 steps; bookkeeping is all that is left, with the check of foreign writes where
the step does not do it on its way.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.cases import CASES, QUICK_CASES, Case, build
from benchmarks.machine import ROOT, describe_commit
from benchmarks.peers import INTERVAL, IVON_OPTIONS
from benchmarks.table import write_csv
from ivon_lora import IVON, RankPruner, noise_store

RESULTS = ROOT / "benchmarks" / "results" / "step_split.csv"
PARTS = ("noise", "sample", "step", "scores", "selection", "bookkeeping")


@dataclass(frozen=True)
class Share:
    """One row: milliseconds of processor time per step of one part, and nanoseconds per element."""

    case: str
    backend: str
    part: str
    cpu_ms: float
    ns_per_element: float
    rounds: int
    commit: str


class _Timers:
    """Adds up the processor time of calls by name."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def watch(self, owner: Any, method: str, name: str) -> None:
        """Time a method of one object from now on."""
        call: Callable[..., Any] = getattr(owner, method)

        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.process_time()
            try:
                return call(*arguments, **options)
            finally:
                self.seconds[name] += time.process_time() - start

        setattr(owner, method, timed)


def split(case: Case, backend: str, rounds: int) -> dict[str, float]:
    """Milliseconds per step of each of `PARTS`, medians over the rounds."""
    kept, again = _stepper(case, backend, False), _stepper(case, backend, False)
    pruned = _stepper(case, backend, True) if case.linears else None
    found: dict[str, list[float]] = {part: [] for part in PARTS}
    for round_ in range(rounds + 2):
        with patch.object(noise_store, "LIMIT", 1 << 40):
            bare = kept()
        with patch.object(noise_store, "LIMIT", 0):
            drawing = again()
        ranked = pruned() if pruned else {}
        if round_ < 2:
            continue
        noise = max(drawing["step"] - bare["step"], 0.0)
        scores, allocation = ranked.get("scores", 0.0) / INTERVAL, ranked.get("allocation", 0.0) / INTERVAL
        values = {
            "noise": noise,
            "sample": max(bare["sample"] - noise, 0.0),
            "step": bare["step"],
            "scores": scores,
            "selection": max(allocation - scores, 0.0),
            "bookkeeping": bare["all"] - bare["sample"] - bare["step"],
        }
        for part, value in values.items():
            found[part].append(value * 1e3)
    return {part: statistics.median(values) for part, values in found.items()}


def _stepper(case: Case, backend: str, pruned: bool) -> Callable[[], dict[str, float]]:
    """Does a step and tells where its time went."""
    trainable = build(case)
    pruner = None
    if pruned:
        pruner = RankPruner(
            trainable.adapters, case.target_rank, total_steps=10_000, warmup=0, final=1, interval=1
        )  # every step allocates
    optimizer = IVON(trainable.tensors, backend=backend, pruner=pruner, **IVON_OPTIONS)
    timers = _Timers()
    device = trainable.tensors[0].device
    timers.watch(optimizer.backend_of(device), "sample", "sample")
    timers.watch(optimizer.backend_of(device), "step", "step")
    if pruner is not None:
        timers.watch(pruner, "_refresh", "scores")
        timers.watch(pruner, "after_update", "allocation")

    def step() -> dict[str, float]:
        timers.seconds.clear()
        start = time.process_time()
        optimizer.train()
        optimizer.step()
        timers.seconds["all"] = time.process_time() - start
        return dict(timers.seconds)

    return step


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.split", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backends", default="eager,compile", help="separated by commas (default: eager,compile)")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--cases", help="names, separated by commas (default: all but the one of 50M elements)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV (default: benchmarks/results/step_split.csv)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    known = {case.name: case for case in (*CASES, *QUICK_CASES)}
    names = options.cases.split(",") if options.cases else [c.name for c in CASES if c.name != "one-tensor-50m"]
    unknown = [name for name in names if name not in known]
    if unknown or options.rounds < 1:
        parser.error(f"--cases: there is no {', '.join(unknown)}" if unknown else "--rounds must be at least 1")
    commit, rows = describe_commit(), []
    for name in names:
        elements = sum(torch.Size(shape).numel() for shape in known[name].shapes())
        for backend in options.backends.split(","):
            for part, ms in split(known[name], backend, options.rounds).items():
                rows.append(Share(name, backend, part, ms, ms * 1e6 / elements, options.rounds, commit))
            print(name, backend, *(f"{row.part} {row.cpu_ms:.2f} ms" for row in rows[-len(PARTS) :]), flush=True)
    write_csv(options.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
