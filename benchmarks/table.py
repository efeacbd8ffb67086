"""The results: one row per case, peer and setting, as a tidy CSV file and as a table to read."""

from __future__ import annotations

import csv
import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.peers import BASELINE, REFERENCE


@dataclass(frozen=True)
class Row:
    """One row; the fields are the columns. Add columns at the end only.

    Empty where a number does not exist. Times are milliseconds per step by the clock (``median_cpu_ms``: processor
    time of all threads), memory is MiB, ratios are ratios of the medians by the clock.
    """

    case: str
    peer: str
    threads: int
    elements: int
    tensors: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int
    ratio_to_adamw_fused: float | None
    speedup_over_ivon_opt: float | None
    malloc: str
    torch: str
    machine: str
    date: str
    commit: str
    peak_extra_mib: float | None
    median_cpu_ms: float


COLUMNS = tuple(field.name for field in fields(Row))


def write_csv(path: Path, rows: Iterable[Any]) -> None:
    """Write all rows, of one dataclass, or leave the file that is there untouched."""
    _replace(path, [{name: _cell(value) for name, value in asdict(row).items()} for row in rows])


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows as text.

    Raises:
        ValueError: the columns are not those of `Row`.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} has the columns {reader.fieldnames}, expected {list(COLUMNS)}")
        return list(reader)


def merge_csv(path: Path, parts: Sequence[Path]) -> None:
    """One file of the rows of several."""
    _replace(path, [row for part in parts for row in read_csv(part)])


def _replace(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]) if rows else COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


#: columns of the printed table and their widths
_HEADER = (
    ("tensors", 9),
    ("elements", 12),
    ("ms", 11),
    ("p20", 10),
    ("p80", 10),
    ("/ AdamW", 10),
    ("x ivon-opt", 12),
    ("cpu ms", 11),
    ("/ AdamW", 10),
    ("x ivon-opt", 12),
    ("peak MiB", 10),
)
LEGEND = """\
Medians (ms) with 20th and 80th percentiles by the clock, then medians of processor time (cpu ms); for both the ratio to
AdamW fused (less is better) and the speed relative to ivon-opt (more is better). Other work on the machine lengthens
the clock's times, long steps more than short ones, but hardly the processor's."""


def render(rows: Sequence[Row]) -> str:
    """The rows as text, one block per case and setting."""
    blocks = []
    for (case, threads, malloc), group in itertools.groupby(rows, key=lambda r: (r.case, r.threads, r.malloc)):
        members = list(group)
        cpu = {r.peer: r.median_cpu_ms for r in members}
        width = max(len(r.peer) for r in members)
        lines = [f"{case}: {threads} thread{'s' if threads > 1 else ''}, malloc {malloc}, {members[0].rounds} rounds"]
        lines.append(f"  {'peer':<{width}}" + "".join(f"{name:>{room}}" for name, room in _HEADER))
        for r in members:
            cells = (
                f"{r.tensors:,}",
                f"{r.elements:,}",
                f"{r.median_ms:.2f}",
                f"{r.p20_ms:.2f}",
                f"{r.p80_ms:.2f}",
                _times(r.ratio_to_adamw_fused),
                _times(r.speedup_over_ivon_opt),
                f"{r.median_cpu_ms:.2f}",
                _times(r.median_cpu_ms / cpu[BASELINE] if BASELINE in cpu else None),
                _times(cpu[REFERENCE] / r.median_cpu_ms if REFERENCE in cpu else None),
                "" if r.peak_extra_mib is None else f"{r.peak_extra_mib:.1f}",
            )
            columns = zip(cells, _HEADER, strict=True)
            lines.append(f"  {r.peer:<{width}}" + "".join(f"{cell:>{room}}" for cell, (_, room) in columns))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"
