"""The numbers of a run on a GPU: a CSV file, and of it a page that says which goals were reached, with one picture."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

BASELINE, REFERENCE, OURS = "adamw[fused]", "ivon-opt", "ivon[triton]"
LLAMA, ONE, MANY = "llama-3.2-3b-lora-r16", "one-1e9", "tensors-4000"


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
    p20: float | None = None
    p80: float | None = None
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
        writer.writerows({name: _cell(value) for name, value in asdict(row).items()} for row in rows)


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


def _row(value: str, p20: str, p80: str, **texts: Any) -> Row:
    return Row(value=float(value), p20=float(p20) if p20 else None, p80=float(p80) if p80 else None, **texts)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------- goals


def value_of(rows: Sequence[Row], metric: str, case: str, peer: str, dtype: str = "float32") -> float | None:
    """A number of the run, if there is one."""
    key = case, dtype, peer, metric
    return next((r.value for r in rows if (r.case, r.dtype, r.peer, r.metric) == key), None)


def _ratio(rows: Sequence[Row], case: str, peer: str, other: str, metric: str = "device_ms") -> float | None:
    a, b = value_of(rows, metric, case, peer), value_of(rows, metric, case, other)
    return None if a is None or not b else a / b


def _total(rows: Sequence[Row], metric: str) -> float | None:
    found = [r.value for r in rows if r.metric == metric]
    return sum(found) if found else None


def _most(rows: Sequence[Row], metric: str) -> float | None:
    return max((r.value for r in rows if r.metric == metric and r.peer.startswith((OURS, "vadam"))), default=None)


def _of_copy(rows: Sequence[Row]) -> float | None:
    ours, copy = value_of(rows, "gb_per_s", ONE, OURS), value_of(rows, "gb_per_s", "copy", "copy", "uint8")
    return None if ours is None or not copy else ours / copy


#: what is asked, the number that answers it, the bound, and whether the number must be at most or at least that
GOALS: tuple[tuple[str, Callable[[Sequence[Row]], float | None], str, float], ...] = (
    ("results that differ from the eager backend's", lambda rows: _total(rows, "faults"), "<=", 0),
    ("launches of a step, two groups", lambda rows: value_of(rows, "launches", LLAMA, OURS), "<=", 2),
    ("launches of a step that allocates ranks", lambda rows: _most(rows, "launches_allocation"), "<=", 4),
    ("steps in which the host waits for the device", lambda rows: _most(rows, "waits"), "<=", 0),
    ("time / AdamW fused, Llama adapter", lambda rows: _ratio(rows, LLAMA, OURS, BASELINE), "<=", 1.0),
    ("times as fast as ivon-opt, Llama adapter", lambda rows: _ratio(rows, LLAMA, REFERENCE, OURS), ">=", 20.0),
    ("time with pruning / without, Llama adapter", lambda rows: _ratio(rows, LLAMA, f"{OURS}+prune", OURS), "<=", 1.03),
    ("time in the final phase / before", lambda rows: _ratio(rows, LLAMA, f"{OURS}+final", OURS), "<=", 1.0),
    ("share of the copy's bandwidth, 1e9 in one tensor", _of_copy, ">=", 0.9),
    ("host time / AdamW fused, 4,000 tensors", lambda rows: _ratio(rows, MANY, OURS, BASELINE, "host_ms"), "<=", 1.0),
)


def goals(rows: Sequence[Row]) -> list[str]:
    """A line for each goal: reached, missed, or not measured."""
    lines = []
    for text, measure, relation, bound in GOALS:
        found = measure(rows)
        if found is None:
            lines.append(f"not measured: {text} (goal {relation} {bound:g})")
            continue
        reached = found <= bound if relation == "<=" else found >= bound
        lines.append(f"{'reached' if reached else 'MISSED'}: {text}: {found:.3g} (goal {relation} {bound:g})")
    return lines


# ---------------------------------------------------------------- the page


def write_page(rows: Sequence[Row], path: Path, picture: str | None) -> str:
    """Write the page, and return it."""
    machines = sorted({f"{r.machine}, torch {r.torch}, Triton {r.triton}, commit {r.commit}, {r.date}" for r in rows})
    lines = ["# The kernels on a GPU", "", *machines, "", *(f"- {line}" for line in goals(rows)), ""]
    if picture is not None:
        lines += [f"![time of a step, and bandwidth]({picture})", ""]
    lines += [
        "Milliseconds per step, median of rounds in which the peers take turns; device: with cold caches, the host",
        "ahead; loop: steps and nothing else. GB/s: of the bytes that the equations must move.",
        "",
        "| case | dtype | peer | device | loop | host | / AdamW fused | GB/s | launches |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    timed = dict.fromkeys((r.case, r.dtype, r.peer) for r in rows if r.metric == "device_ms")
    for case, dtype, peer in timed:

        def cell(metric: str, form: str, case: str = case, dtype: str = dtype, peer: str = peer) -> str:
            found = value_of(rows, metric, case, peer, dtype)
            return "" if found is None else format(found, form)

        ours, base = (value_of(rows, "device_ms", case, name, dtype) for name in (peer, BASELINE))
        ratio = "" if ours is None or not base else f"{ours / base:.2f}"
        times = " | ".join(cell(metric, ".3f") for metric in ("device_ms", "loop_ms", "host_ms"))
        lines.append(
            f"| {case} | {dtype} | {peer} | {times} | {ratio} | {cell('gb_per_s', '.0f')} | {cell('launches', '.0f')} |"
        )
    page = "\n".join(lines) + "\n"
    path.write_text(page)
    return page


def draw(rows: Sequence[Row], path: Path) -> None:
    """Two panels: time of a step relative to AdamW fused, and bandwidth relative to a copy.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys((r.case, r.dtype) for r in rows if r.metric == "device_ms"))
    peers = list(dict.fromkeys(r.peer for r in rows if r.metric == "device_ms" and r.peer != REFERENCE))
    copy = value_of(rows, "gb_per_s", "copy", "copy", "uint8")
    figure, axes = plt.subplots(1, 2, figsize=(12.0, 2.0 + 0.7 * len(cases)), sharey=True, layout="constrained")
    left, right = axes
    height = 0.8 / max(len(peers), 1)
    for number, peer in enumerate(peers):
        for place, (case, dtype) in enumerate(cases):
            at = place + (number - (len(peers) - 1) / 2) * height
            ours, base = (value_of(rows, "device_ms", case, name, dtype) for name in (peer, BASELINE))
            speed = value_of(rows, "gb_per_s", case, peer, dtype)
            label = peer if place == 0 else None
            if ours and base:
                left.barh(at, ours / base, height, color=f"C{number}", label=label)
            if speed and copy:
                right.barh(at, speed / copy, height, color=f"C{number}")
    left.axvline(1.0, color="black", linewidth=1)
    right.axvline(1.0, color="black", linewidth=1)
    left.set_yticks(range(len(cases)), [f"{case}\n{dtype}" for case, dtype in cases])
    left.invert_yaxis()
    left.set_xlabel("time of a step / AdamW fused")
    right.set_xlabel("bandwidth / that of a copy")
    figure.legend(loc="outside right upper", fontsize=8)  # no place inside is free for sure
    figure.suptitle(f"One optimizer step on {rows[0].machine}" if rows else "")
    figure.savefig(path, dpi=130)
    plt.close(figure)
