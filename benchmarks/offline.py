"""What the compilers make of the kernels, for every target: registers, spills, instructions, bytes. Needs no GPU.

What of it a step executes is counted by `executed`.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from benchmarks.executed import EXECUTED_RESULTS, ExecutedRow, executed_rows, render
from benchmarks.machine import ROOT, describe_commit

OFFLINE_RESULTS = ROOT / "benchmarks" / "results" / "kernels_offline.csv"


@dataclass(frozen=True)
class OfflineRow:
    """One kernel for one target; the fields are the columns. Add columns at the end only.

    Instructions are those in the machine code, the path for tensors at odd addresses included, of which a tile runs
    one. Vector loads and stores move 16 bytes per thread.
    """

    kernel: str
    target: str
    registers: int
    spills: int
    shared_bytes: int
    instructions: int
    vector_loads: int
    vector_stores: int
    triton: str
    commit: str


def offline_rows() -> list[OfflineRow]:
    """Compile every kernel of the tests for every target; takes a minute or two."""
    import importlib.metadata

    from tests.offline_compile import AMD_GFX942, NVIDIA_SM80, NVIDIA_SM90, NVIDIA_SM100, compile_all
    from tests.test_triton_compiles import KERNELS

    targets = (NVIDIA_SM80, NVIDIA_SM90, NVIDIA_SM100, AMD_GFX942)
    compiled = compile_all({name: (kernel, targets) for name, (kernel, *_) in KERNELS.items()})
    rows = []
    for name, codes in compiled.items():
        for target, code in codes.items():
            text = code.sass or code.assembly
            instruction = (
                r"(?m)^\s+/\*[0-9a-f]{4,}\*/\s" if code.sass else r"(?m)^\s+[sv]_\w+|^\s+(?:global|buffer|ds)_\w+"
            )
            load = r"\bLDG\.E\.128\b" if code.sass else r"\b(?:global|buffer)_load_dwordx4\b"
            store = r"\bSTG\.E\.128\b" if code.sass else r"\b(?:global|buffer)_store_dwordx4\b"
            rows.append(
                OfflineRow(
                    kernel=name,
                    target=target,
                    registers=code.registers,
                    spills=code.spills,
                    shared_bytes=code.shared,
                    instructions=len(re.findall(instruction, text)),
                    vector_loads=len(re.findall(load, text)),
                    vector_stores=len(re.findall(store, text)),
                    triton=importlib.metadata.version("triton"),
                    commit=describe_commit(),
                )
            )
    return rows


def _write(path: Path, rows: Sequence[OfflineRow | ExecutedRow]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(rows[0])], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def write_offline_table(path: Path | None = None) -> str:
    """Compile and count, write the CSV files and return the tables.

    Args:
        path: of the first file, beside which the other comes; by default those of the repository's results.
    """
    from benchmarks.kernels import ADAMW_BYTES, BYTES

    rows = offline_rows()
    path = path or OFFLINE_RESULTS
    _write(path, rows)
    lines = [
        f"{'kernel':34} {'target':16} {'registers':>9} {'spills':>7} {'shared B':>9} {'instructions':>13} "
        f"{'16-byte loads':>14} {'stores':>7}"
    ]
    for r in rows:
        lines.append(
            f"{r.kernel:34} {r.target:16} {r.registers:9} {r.spills:7} {r.shared_bytes:9} {r.instructions:13} "
            f"{r.vector_loads:14} {r.vector_stores:7}"
        )
    for dtype in BYTES:
        name = str(dtype).removeprefix("torch.")
        lines.append(f"Bytes per {name} element: sample and step {BYTES[dtype]}; AdamW {ADAMW_BYTES[dtype]}.")
    lines.append("Instructions include the path for tensors at odd addresses, of which a tile runs one.")
    executed = executed_rows()
    _write(path.with_name(EXECUTED_RESULTS.name), executed)
    return "\n".join([*lines, "", render(executed)])
