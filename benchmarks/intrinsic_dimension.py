"""The intrinsic dimension of many points of many features: is it right, how long does it take, in how much memory?

    python -m benchmarks.intrinsic_dimension                     # 10,000 points of 4096 features: under a minute
    python -m benchmarks.intrinsic_dimension --points 100000     # 8e9 distances, 33e12 operations: 10 to 20 minutes
    python -m benchmarks.intrinsic_dimension --quick             # does it work? Writes nothing

The points lie on a sphere S^d, bent into the features by sines of random projections. That map keeps the distances of
neighbours (its kernel is a Gaussian of the distance) and fills every feature, so d is known and no projection shows it.
Each run appends a row to benchmarks/results/intrinsic_dimension.csv. Memory is what the call needs at its peak beyond
the points themselves, as the operating system sees it.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.machine import ROOT, describe_commit, describe_machine
from benchmarks.memory import peak_extra_bytes
from ivon_lora import IntrinsicDimension, intrinsic_dimension

OUT = ROOT / "benchmarks" / "results" / "intrinsic_dimension.csv"


@dataclass(frozen=True)
class Row:
    """One run; the fields are the columns. Sizes in MiB; ``peak_mib`` is -1 where the system does not tell."""

    points: int
    features: int
    dimension: int
    estimate: float
    low: float
    high: float
    cpu_seconds: float
    wall_seconds: float
    points_mib: float
    peak_mib: float
    distances_mib: float
    threads: int
    torch: str
    machine: str
    date: str
    commit: str


def bent_sphere(n: int, features: int, d: int, seed: int = 0) -> Tensor:
    """n points of the sphere S^d under a smooth map into ``features`` dimensions, fp32, shape (n, features)."""
    generator = torch.Generator().manual_seed(seed)
    sphere = torch.nn.functional.normalize(torch.randn(n, d + 1, generator=generator))
    phase = 2 * math.pi * torch.rand(features, generator=generator)
    return torch.addmm(phase, sphere, torch.randn(d + 1, features, generator=generator)).sin_()


def measure(n: int, features: int, d: int) -> Row:
    """Make the points and estimate their dimension."""
    x = bent_sphere(n, features, d)
    found: list[IntrinsicDimension] = []
    wall, cpu = time.perf_counter(), time.process_time()
    peak = peak_extra_bytes(lambda: found.append(intrinsic_dimension(x)))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Row(
        points=n,
        features=features,
        dimension=d,
        estimate=found[0].estimate,
        low=found[0].low,
        high=found[0].high,
        cpu_seconds=cpu,
        wall_seconds=wall,
        points_mib=x.nbytes / 2**20,
        peak_mib=-1 if peak is None else peak / 2**20,
        distances_mib=4 * n * n / 2**20,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        machine=describe_machine("shared"),
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        commit=describe_commit(),
    )


def append(path: Path, row: Row) -> None:
    """Add a row at the end of the file, which is made if it is not there."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow({name: f"{v:.5g}" if isinstance(v, float) else v for name, v in asdict(row).items()})


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.intrinsic_dimension",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--points", type=int, default=10_000, help="how many (default: 10000)")
    parser.add_argument("--features", type=int, default=4096, help="of each point (default: 4096)")
    parser.add_argument("--dimension", type=int, default=8, help="of the sphere (default: 8)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--quick", action="store_true", help="300 points of 64 features, no row")
    parser.add_argument("--out", type=Path, default=OUT, help="CSV file (default: in results/)")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if options.quick:
        row = measure(300, 64, options.dimension)
    else:
        row = measure(options.points, options.features, options.dimension)
        append(options.out, row)
    print("\n".join(f"{name:<14}{value:.5g}" if isinstance(value, float) else f"{name:<14}{value}"
                    for name, value in asdict(row).items()))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
