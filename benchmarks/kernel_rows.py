"""The results of the kernel benchmark: one row per case, dtype and peer, as a CSV file and as a table to read."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

BASELINE = "adamw[fused]"
REFERENCE = "ivon-opt"


@dataclass(frozen=True)
class KernelRow:
    """One row; the fields are the columns. Add columns at the end only.

    Times are milliseconds per step, see `gpu.Timing`. ``gb_per_s`` counts the bytes that the equations must move
    (``bytes_per_element``, empty for peers that have no such number), ``copy_gb_per_s`` is the ceiling measured in the
    same process. Ratios are of device times, ``loop_ratio_to_adamw_fused`` of elapsed times.
    """

    case: str
    peer: str
    dtype: str
    elements: int
    tensors: int
    rank: int
    device_ms: float
    device_p20_ms: float
    device_p80_ms: float
    elapsed_ms: float
    host_ms: float
    launches: int | None
    bytes_per_element: int | None
    gb_per_s: float | None
    copy_gb_per_s: float
    ratio_to_adamw_fused: float | None
    loop_ratio_to_adamw_fused: float | None
    speedup_over_ivon_opt: float | None
    torch: str
    triton: str
    machine: str
    date: str
    commit: str

    @property
    def of_copy(self) -> float | None:
        """Share of the measured ceiling."""
        return None if self.gb_per_s is None else self.gb_per_s / self.copy_gb_per_s


COLUMNS = tuple(field.name for field in fields(KernelRow))
_CONVERSIONS = {"str": str, "int": int, "float": float}


def write_rows(path: Path, rows: Iterable[KernelRow]) -> None:
    """Write all rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in asdict(row).items()} for row in rows)


def read_rows(path: Path) -> list[KernelRow]:
    """The rows of a file.

    Raises:
        ValueError: its columns are not those of `KernelRow`.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} has the columns {reader.fieldnames}, expected {list(COLUMNS)}")
        return [KernelRow(**{f.name: _value(str(f.type), row[f.name]) for f in fields(KernelRow)}) for row in reader]


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _value(kind: str, text: str) -> Any:
    name, _, optional = kind.partition(" | ")
    return None if optional and not text else _CONVERSIONS[name](text)


_HEADER = (
    ("tensors", 8),
    ("elements", 15),
    ("device ms", 11),
    ("loop ms", 10),
    ("host ms", 9),
    ("launches", 9),
    ("GB/s", 7),
    ("of copy", 8),
    ("/ AdamW", 9),
    ("loop / AdamW", 13),
    ("x ivon-opt", 11),
)


def render(rows: Sequence[KernelRow]) -> str:
    """The rows as a table."""
    width = max((len(r.peer) for r in rows), default=0)
    lines = [f"{'case':22} {'dtype':9} {'peer':<{width}}" + "".join(f"{name:>{room}}" for name, room in _HEADER)]
    for r in rows:
        cells = (
            f"{r.tensors:,}",
            f"{r.elements:,}",
            f"{r.device_ms:.3f}",
            f"{r.elapsed_ms:.3f}",
            f"{r.host_ms:.3f}",
            "" if r.launches is None else str(r.launches),
            "" if r.gb_per_s is None else f"{r.gb_per_s:.0f}",
            "" if r.of_copy is None else f"{100 * r.of_copy:.0f} %",
            _times(r.ratio_to_adamw_fused),
            _times(r.loop_ratio_to_adamw_fused),
            _times(r.speedup_over_ivon_opt),
        )
        columns = zip(cells, _HEADER, strict=True)
        lines.append(f"{r.case:22} {r.dtype:9} {r.peer:<{width}}" + "".join(f"{c:>{room}}" for c, (_, room) in columns))
    return "\n".join(lines)


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"
