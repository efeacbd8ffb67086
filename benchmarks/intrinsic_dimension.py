"""The intrinsic dimension of many points of many features: is it right, how long does it take, in how much memory?

    python -m benchmarks.intrinsic_dimension                     # 10,000 points of 4096 features: under a minute
    python -m benchmarks.intrinsic_dimension --points 100000     # 8e9 distances, 33e12 operations: 10 to 20 minutes

The points lie on a sphere S^d, bent into the features by sines of random projections. That map keeps the distances of
neighbours (its kernel is a Gaussian of the distance) and fills every feature, so d is known and no projection shows it.
Each run appends a row to benchmarks/results/intrinsic_dimension.csv. Memory is what the call needs at its peak beyond
the points themselves, as the operating system sees it.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import ledger
from benchmarks.machine import RESULTS, peak_extra_mib
from ivon_lora import IntrinsicDimension, intrinsic_dimension

OUT = RESULTS / "intrinsic_dimension.csv"


def bent_sphere(n: int, features: int, d: int) -> Tensor:
    """n points of the sphere S^d under a smooth map into ``features`` dimensions, fp32, shape (n, features)."""
    generator = torch.Generator().manual_seed(0)
    sphere = torch.nn.functional.normalize(torch.randn(n, d + 1, generator=generator))
    phase = 2 * math.pi * torch.rand(features, generator=generator)
    return torch.addmm(phase, sphere, torch.randn(d + 1, features, generator=generator)).sin_()


def measure(n: int, features: int, d: int) -> dict[str, Any]:
    """Make the points and estimate their dimension: one row, sizes in MiB."""
    x = bent_sphere(n, features, d)
    found: list[IntrinsicDimension] = []
    wall, cpu = time.perf_counter(), time.process_time()
    peak = peak_extra_mib(lambda: found.append(intrinsic_dimension(x)))
    return {
        "points": n,
        "features": features,
        "dimension": d,
        "estimate": found[0].estimate,
        "low": found[0].low,
        "high": found[0].high,
        "cpu_seconds": time.process_time() - cpu,
        "wall_seconds": time.perf_counter() - wall,
        "points_mib": x.nbytes / 2**20,
        "peak_mib": peak,
        "distances_mib": 4 * n * n / 2**20,
        "threads": torch.get_num_threads(),
    }


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
    parser.add_argument("--out", type=Path, default=OUT, help="CSV file (default: in results/)")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    rows = ledger.append(options.out, [measure(options.points, options.features, options.dimension)])
    print(rows.iloc[-1].to_string())
    return 0


if __name__ == "__main__":
    sys.exit(main())
