"""What compilers make of the kernels, for GPUs that are not here: registers, spills, instructions, seconds.

./dev bench-kernels                                 # with the Triton that is installed
./dev bench-kernels --triton /tmp/t36 /tmp/t39      # and others: pip install --no-deps --target /tmp/t36 triton==3.6.0
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.machine import ROOT, describe_commit
from tests.offline_compile import KERNELS, TARGETS, Compiled, compile_all

RESULTS = ROOT / "benchmarks" / "results" / "kernels_offline.csv"


def row_of(kernel: str, target: str, code: Compiled) -> dict[str, Any]:
    """What the machine code tells.

    Instructions are those in the code, the path for tensors at odd addresses included, of which a tile runs one. Vector
    loads and stores move 16 bytes per thread. Seconds are the processor's.
    """
    text = code.sass or code.assembly
    instruction = r"(?m)^\s+/\*[0-9a-f]{4,}\*/\s" if code.sass else r"(?m)^\s+[sv]_\w+|^\s+(?:global|buffer|ds)_\w+"
    load = r"\bLDG\.E\.128\b" if code.sass else r"\b(?:global|buffer)_load_dwordx4\b"
    store = r"\bSTG\.E\.128\b" if code.sass else r"\b(?:global|buffer)_store_dwordx4\b"
    patterns = {"instructions": instruction, "vector_loads": load, "vector_stores": store}
    row = {"kernel": kernel, "target": target, "triton": code.triton, "registers": code.registers}
    row |= {"spills": code.spills, "shared_bytes": code.shared}
    row |= {name: len(re.findall(pattern, text)) for name, pattern in patterns.items()}
    return {**row, "seconds": round(code.seconds, 1), "commit": describe_commit()}


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
            rows += [row_of(name, target, code) for target, code in codes.items()]
    table = pd.DataFrame(rows).sort_values("triton", kind="stable")
    table.to_csv(options.out, index=False, lineterminator="\n")
    print(table.to_string(index=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
