"""The numbers of a run on a GPU: a CSV file, and of it a page that says which goals were reached, and a picture."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from benchmarks.cases import LLAMA
from benchmarks.peers import BASELINE, REFERENCE, ours
from benchmarks.tables import Goal, goals_table, markdown

OURS, PRUNING = ours("triton"), ours("triton", pruned=True)
FINAL, VADAM = f"{OURS}+final", "vadam[triton]"
ONE, MANY = "one-1e9", "tensors-4000"


@dataclass(frozen=True)
class Row:
    """One number; the fields are the columns. Add columns at the end only.

    Attributes:
        task: what of the run it belongs to; a task that has rows is not run again.
        case, dtype, peer: what was measured.
        metric, value: "device_ms", "loop_ms" and "host_ms" per step (see `device_time.Timing`), "launches",
            "launches_allocation", "gb_per_s" of the bytes that the equations must move, "waits" (1: the host waited),
            "faults" (results that were not those of the eager backend).
        p20, p80: percentiles, of times.
    """

    task: str
    case: str
    dtype: str
    peer: str
    metric: str
    value: float
    p20: float = math.nan
    p80: float = math.nan
    machine: str = ""
    torch: str = ""
    triton: str = ""
    commit: str = ""
    date: str = ""


COLUMNS = tuple(field.name for field in fields(Row))


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write all rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, rows))


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, none if there is no file.

    Raises:
        ValueError: its columns are not those of `Row`.
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} has the columns {reader.fieldnames}, expected {list(COLUMNS)}: move it away")
        return [_row(**row) for row in reader]


def _row(value: str, p20: str, p80: str, **texts: str) -> Row:
    return Row(value=float(value), p20=float(p20), p80=float(p80), **texts)


class Numbers:
    """The values of a run by what was measured, NaN where it was not."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.values = {(r.metric, r.case, r.peer, r.dtype): r.value for r in rows}

    def of(self, metric: str, case: str, peer: str, dtype: str = "float32") -> float:
        """One value."""
        return self.values.get((metric, case, peer, dtype), math.nan)

    def ratio(self, metric: str, case: str, peer: str, other: str, dtype: str = "float32") -> float:
        """That of a peer / that of another."""
        return self.of(metric, case, peer, dtype) / self.of(metric, case, other, dtype)


def goals(rows: Sequence[Row]) -> list[Goal]:
    """What is asked of the kernels, and the number that answers it."""
    numbers = Numbers(rows)
    of, ratio = numbers.of, numbers.ratio
    faults = [row.value for row in rows if row.metric == "faults"]
    allocations = [row.value for row in rows if row.metric == "launches_allocation"]
    waits = [row.value for row in rows if row.metric == "waits" and row.peer not in (BASELINE, REFERENCE)]
    of_copy = of("gb_per_s", ONE, OURS) / of("gb_per_s", "copy", "copy", "uint8")
    return [
        Goal("results that differ from the eager backend's", "<=", 0, sum(faults) if faults else math.nan),
        Goal("launches of a step, two groups", "<=", 2, of("launches", LLAMA, OURS)),
        Goal("launches of a step that allocates ranks", "<=", 4, max(allocations, default=math.nan)),
        Goal("steps in which the host waits for the device", "<=", 0, max(waits, default=math.nan)),
        Goal("time / AdamW fused, Llama adapter", "<=", 1, ratio("device_ms", LLAMA, OURS, BASELINE)),
        Goal("times as fast as ivon-opt, Llama adapter", ">=", 20, ratio("device_ms", LLAMA, REFERENCE, OURS)),
        Goal("time with pruning / without, Llama adapter", "<=", 1.03, ratio("device_ms", LLAMA, PRUNING, OURS)),
        Goal("time in the final phase / before", "<=", 1, ratio("device_ms", LLAMA, FINAL, OURS)),
        Goal("share of the copy's bandwidth, 1e9 in one tensor", ">=", 0.9, of_copy),
        Goal("host time / AdamW fused, 4,000 tensors", "<=", 1, ratio("host_ms", MANY, OURS, BASELINE)),
    ]


PAGE = """\
# The kernels on a GPU

{machines}

{goals}

Milliseconds per step, median of rounds in which the peers take turns; device: with cold caches, the host ahead; loop:
steps and nothing else. GB/s: of the bytes that the equations must move.

{times}
{picture}"""


def page(rows: Sequence[Row], picture: str | None = None) -> str:
    """The page in Markdown, with the picture in a file of this name."""
    machines = sorted({f"{r.machine}, torch {r.torch}, Triton {r.triton}, commit {r.commit}, {r.date}" for r in rows})
    numbers, lines = Numbers(rows), []
    for case, dtype, peer in dict.fromkeys((r.case, r.dtype, r.peer) for r in rows if r.metric == "device_ms"):
        cells = [numbers.of(metric, case, peer, dtype) for metric in ("device_ms", "loop_ms", "host_ms")]
        cells.append(numbers.ratio("device_ms", case, peer, BASELINE, dtype))
        cells += [numbers.of(metric, case, peer, dtype) for metric in ("gb_per_s", "launches")]
        lines.append([case, dtype, peer, *("" if math.isnan(cell) else f"{cell:.4g}" for cell in cells)])
    head = ("case", "dtype", "peer", "device", "loop", "host", "/ AdamW fused", "GB/s", "launches")
    parts = {"machines": "\n".join(machines), "goals": goals_table(goals(rows)), "times": markdown(head, lines)}
    return PAGE.format(**parts, picture=f"\n![time of a step, relative to AdamW fused]({picture})\n" if picture else "")


def draw(rows: Sequence[Row], path: Path) -> None:
    """Time of a step relative to AdamW fused, case by case; ivon-opt, many times as slow, is left out.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    from matplotlib.figure import Figure

    numbers, timed = Numbers(rows), [row for row in rows if row.metric == "device_ms" and row.peer != REFERENCE]
    cases, peers = list(dict.fromkeys((r.case, r.dtype) for r in timed)), list(dict.fromkeys(r.peer for r in timed))
    figure = Figure(figsize=(9.0, 1.5 + 0.8 * len(cases)), layout="constrained")
    axes, height = figure.subplots(), 0.8 / max(len(peers), 1)
    for n, peer in enumerate(peers):
        ratios = [numbers.ratio("device_ms", case, peer, BASELINE, dtype) for case, dtype in cases]
        axes.barh([i + (n + 0.5) * height - 0.4 for i in range(len(cases))], ratios, height, label=peer)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks(range(len(cases)), [f"{case}\n{dtype}" for case, dtype in cases])
    axes.invert_yaxis()
    axes.set_xlabel("time of a step / AdamW fused")
    if peers:
        figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=130)
