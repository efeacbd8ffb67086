"""How the cost of a step grows with the number of elements, and with the number of tensors.

    python -m benchmarks.scaling                        # about two minutes

Processor time on one thread, peers interleaved, medians. One flat tensor of 10^3 to 10^7 elements; and 5 million
elements in 1 to 4,000 tensors.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.cases import Case, many_linears
from benchmarks.machine import ROOT, describe_commit
from benchmarks.measure import interleave, steps_needed
from benchmarks.peers import BASELINE, REFERENCE, make_peers
from benchmarks.table import write_csv

RESULTS = ROOT / "benchmarks" / "results" / "step_scaling.csv"
ELEMENTS = (
    Case("flat-1e3", 30, flat=10**3),
    Case("flat-1e4", 30, flat=10**4),
    Case("flat-1e5", 15, flat=10**5),
    Case("flat-1e6", 7, flat=10**6),
    Case("flat-1e7", 3, flat=10**7),
)
TENSORS = (
    Case("tensors-1", 5, flat=5_000_000),
    *(Case(f"tensors-{2 * n}", 5, many_linears(n, features=1_250_000 // n), rank=2) for n in (20, 200, 2000)),
)


@dataclass(frozen=True)
class Point:
    """One row: the cost of a step of one peer at one size."""

    sweep: str
    peer: str
    elements: int
    tensors: int
    median_cpu_ms: float
    min_cpu_ms: float
    rounds: int
    commit: str


def points(sweep: str, case: Case, backends: Sequence[str], commit: str) -> list[Point]:
    """Every peer of the plot at one size."""
    wanted = {BASELINE, REFERENCE, *(f"ivon-lora[{backend}]" for backend in backends)}
    peers = make_peers(case, steps_needed(case.rounds), backends, wanted.__contains__)
    costs = interleave(peers, case.rounds)
    found = []
    for peer in peers:
        cpu = [cost.cpu_ms for cost in costs[peer.name]]
        elements = sum(p.numel() for p in peer.tensors)
        found.append(
            Point(sweep, peer.name, elements, len(peer.tensors), statistics.median(cpu), min(cpu), len(cpu), commit)
        )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backends", default="eager,compile", help="separated by commas (default: eager,compile)")
    parser.add_argument("--quick", action="store_true", help="only the smallest tensor; the numbers mean nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV (default: benchmarks/results/step_scaling.csv)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    commit, rows = describe_commit(), []
    sweeps = [("elements", case) for case in ELEMENTS] + [("tensors", case) for case in TENSORS]
    for sweep, case in sweeps[:1] if options.quick else sweeps:
        new = points(sweep, case, options.backends.split(","), commit)
        print(case.name, *(f"{point.peer} {point.median_cpu_ms:.3g} ms" for point in new), flush=True)
        rows += new
    write_csv(options.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
