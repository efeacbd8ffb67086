"""What compilers make of the kernels, for GPUs that are not here: registers, spills, instructions, seconds.

./dev bench-kernels                                 # with the Triton that is installed
./dev bench-kernels --triton /tmp/t36 /tmp/t39      # and others: pip install --no-deps --target /tmp/t36 triton==3.6.0
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from benchmarks.machine import ROOT, describe_commit
from tests.offline_compile import KERNELS, TARGETS, Compiled, compile_all

RESULTS = ROOT / "benchmarks" / "results" / "kernels_offline.csv"


@dataclass(frozen=True)
class OfflineRow:
    """One kernel for one target; the fields are the columns. Add columns at the end only.

    Instructions are those in the machine code, the path for tensors at odd addresses included, of which a tile runs
    one. Vector loads and stores move 16 bytes per thread. Seconds are the processor's.
    """

    kernel: str
    target: str
    triton: str
    registers: int
    spills: int
    shared_bytes: int
    instructions: int
    vector_loads: int
    vector_stores: int
    seconds: float
    commit: str


def row_of(kernel: str, target: str, code: Compiled, commit: str) -> OfflineRow:
    """Read the machine code."""
    text = code.sass or code.assembly
    instruction = r"(?m)^\s+/\*[0-9a-f]{4,}\*/\s" if code.sass else r"(?m)^\s+[sv]_\w+|^\s+(?:global|buffer|ds)_\w+"
    load = r"\bLDG\.E\.128\b" if code.sass else r"\b(?:global|buffer)_load_dwordx4\b"
    store = r"\bSTG\.E\.128\b" if code.sass else r"\b(?:global|buffer)_store_dwordx4\b"
    instructions, loads, stores = (len(re.findall(pattern, text)) for pattern in (instruction, load, store))
    return OfflineRow(
        kernel, target, code.triton, code.registers, code.spills, code.shared, instructions, loads, stores,
        round(code.seconds, 1), commit,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="./dev bench-kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--triton", type=Path, nargs="+", default=[], help="directories with other releases of Triton")
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV file")
    options = parser.parse_args(argv)
    rows = []
    for triton in (None, *options.triton):
        compiled = compile_all({name: (kernel, TARGETS) for name, kernel in KERNELS.items()}, triton)
        for name, codes in compiled.items():
            rows += [row_of(name, target, code, describe_commit()) for target, code in codes.items()]
    rows.sort(key=lambda row: (row.triton, list(KERNELS).index(row.kernel)))
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(OfflineRow)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, rows))
    for row in rows:
        print(f"{row.triton:8} {row.kernel:34} {row.target:14} {row.registers:4} registers, {row.spills} spills")
    return 0


if __name__ == "__main__":
    sys.exit(main())
