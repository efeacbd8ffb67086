"""The page and the picture of the step benchmarks, from their CSV files.

python -m benchmarks.step_report      # writes benchmarks/results/step.md and step.png
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import scaling, split, step
from benchmarks.cases import CASES
from benchmarks.machine import MALLOCS
from benchmarks.peers import BASELINE, REFERENCE
from benchmarks.table import read_csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LLAMA, MINILM, FLAT, MANY = "llama-3.2-3b-lora-r16", "minilm-lora-r8", "one-tensor-5m", "4000-tensors-5m"
EAGER, COMPILE = "ivon-lora[eager]", "ivon-lora[compile]"

#: Okabe and Ito's colours, which the colour-blind tell apart; markers and dashes say the same
_STYLES = {
    REFERENCE: ("ivon-opt", "#D55E00", "s", "--"),
    EAGER: ("eager", "#0072B2", "o", "-"),
    COMPILE: ("compile", "#009E73", "^", "-"),
    BASELINE: ("AdamW fused", "#555555", "x", ":"),
}

Row = dict[str, str]


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--folder", type=Path, default=step.RESULTS.parent, help="of the CSV files, and of the results")
    folder: Path = parser.parse_args(argv).folder
    rows = read_csv(folder / step.RESULTS.name)
    shares, points = _rows(folder / split.RESULTS.name), _rows(folder / scaling.RESULTS.name)
    (folder / "step.md").write_text(page(rows, shares, points))
    if points:
        picture(points).savefig(folder / "step.png", dpi=120)
    return 0


def _rows(path: Path) -> list[Row]:
    """The rows of a file, none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------- the page


def page(rows: Sequence[Row], shares: Sequence[Row], points: Sequence[Row]) -> str:
    """The page as Markdown."""
    commits = sorted({row["commit"] for row in [*rows, *shares, *points]})
    return f"""# Whole optimizer steps on CPU

Written by `python -m benchmarks.step_report` from `step.csv`, `step_split.csv` and `step_scaling.csv`; commits
{", ".join(commits)}. Times are processor time (medians), because the machine was shared with other work; ratios compare
peers of one run, interleaved, but for the last
goal, whose two cases are two runs. A step is sample, update, and with pruning an allocation every 10 steps.

## Goals

{_table(("what", "goal", "measured", "verdict"), goals(rows))}

## Every run

{_table(("case", "threads", "malloc", "peer", "rounds", "ms", "ns/element", "x ivon-opt", "/ AdamW"), _runs(rows))}

Not run: {not_run(rows)}.

## Where the time goes

Milliseconds of one step that finds all its noise kept, on one thread. `noise` is what drawing it once costs.

{_table(("case", "backend", *split.PARTS, "sum"), _split_table(shares))}

## Limits

{limits(rows, shares)}

## What grows

![cost against elements and against tensors](step.png)

{_scaling_text(points)}
"""


#: bytes per fp32 element that must move: AdamW's step, and IVON's sample and step
_ADAMW_BYTES, _IVON_BYTES = 28, 16 + 28


def limits(rows: Sequence[Row], shares: Sequence[Row]) -> str:
    """How far each backend is from what memory and the arithmetic of the noise allow, on the tensor of 5M elements."""
    adamw = _cpu(rows, FLAT, BASELINE)
    if adamw is None:
        return "Not run."
    elements = next(int(row["elements"]) for row in rows if row["case"] == FLAT)
    floor = adamw * _IVON_BYTES / _ADAMW_BYTES
    lines = [
        f"On the tensor of {elements:,} elements AdamW fused moves {_ADAMW_BYTES} bytes per element at "
        f"{elements * _ADAMW_BYTES / adamw / 1e6:.0f} GB/s. At that rate the {_IVON_BYTES} bytes of sample and step "
        f"take {floor:.1f} ms: the limit of memory."
    ]
    for peer, backend in ((EAGER, "eager"), (COMPILE, "compile")):
        own = _cpu(rows, FLAT, peer)
        noise = [
            float(r["ns_per_element"])
            for r in shares
            if (r["case"], r["backend"], r["part"]) == (FLAT, backend, "noise")
        ]
        if own is not None:
            drawing = f" Drawing a normal once costs {noise[0]:.1f} ns." if noise else ""
            lines.append(f"`{backend}` needs {own:.1f} ms, {own / floor:.1f} times that.{drawing}")
    lines.append(
        "What is left of `eager` are numpy's passes, for each element: about 18 of 8 bytes for Philox and 28 of 4 "
        "bytes for Box-Muller (once where the noise is kept), 5 for a sample, 31 for a step with Price's curvature. "
        "Each reads and writes a block in the second-level cache or beyond, and a call costs about a microsecond."
    )
    small = [
        f"{100 * share:.0f} % ({name})"
        for case, name in ((MINILM, "MiniLM adapter"), (MANY, "4,000 tensors"))
        if (share := _bookkeeping(shares, case)) is not None
    ]
    if small:
        lines.append(
            f"Of `compile`'s time with small tensors {' and '.join(small)} are bookkeeping: whether the tensors are "
            "still the same and where they were, whether somebody wrote over a sample, and the calls themselves."
        )
    return "\n\n".join(lines)


def _bookkeeping(shares: Sequence[Row], case: str) -> float | None:
    """The part of the compiled backend's step that is bookkeeping."""
    mine = {r["part"]: float(r["cpu_ms"]) for r in shares if (r["case"], r["backend"]) == (case, "compile")}
    return mine["bookkeeping"] / sum(mine.values()) if mine else None


def goals(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """What was wanted, what was measured, and whether it is enough; "not run" where there are no rows."""
    found: list[tuple[str, ...]] = []

    def goal(what: str, value: float | None, bound: float, at_least: bool, unit: str) -> None:
        sign = ">=" if at_least else "<="
        if value is None:
            found.append((what, f"{sign} {bound:g}{unit}", "not run", ""))
            return
        reached = value >= bound if at_least else value <= bound
        found.append((what, f"{sign} {bound:g}{unit}", f"{value:.3g}{unit}", "reached" if reached else "missed"))

    def faster(case: str, peer: str, malloc: str = "default") -> float | None:
        return _ratio(_cpu(rows, case, REFERENCE, malloc), _cpu(rows, case, peer, malloc))

    goal("392 tensors: eager against ivon-opt", faster(LLAMA, EAGER), 3.5, True, "x")
    goal("392 tensors: compile against ivon-opt", faster(LLAMA, COMPILE), 12, True, "x")
    goal("392 tensors: compile against ivon-opt, both with malloc tuned", faster(LLAMA, COMPILE, "tuned"), 3, True, "x")
    goal("MiniLM adapter: eager against ivon-opt", faster(MINILM, EAGER), 1.1, True, "x")
    goal("MiniLM adapter: compile against ivon-opt", faster(MINILM, COMPILE), 4, True, "x")
    goal("5M in one tensor: compile against ivon-opt", faster(FLAT, COMPILE), 5, True, "x")
    for case, name in ((LLAMA, "392 tensors"), (MINILM, "MiniLM adapter"), (MANY, "4,000 tensors")):
        more = _ratio(_cpu(rows, case, f"{COMPILE}+prune"), _cpu(rows, case, COMPILE))
        goal(f"{name}: what pruning adds to compile", None if more is None else 100 * (more - 1), 5, False, " %")
    many = _ratio(_cpu(rows, MANY, COMPILE), _cpu(rows, FLAT, COMPILE))
    goal("4,000 tensors against one of as many elements, compile", many, 1.5, False, "x")
    return found


def _cpu(rows: Iterable[Row], case: str, peer: str, malloc: str = "default") -> float | None:
    for row in rows:
        if (row["case"], row["peer"], row["malloc"], row["threads"]) == (case, peer, malloc, "1"):
            return float(row["median_cpu_ms"])
    return None


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


def _runs(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    found = []
    for row in rows:
        same = [r for r in rows if all(r[name] == row[name] for name in ("case", "threads", "malloc"))]
        cpu = {r["peer"]: float(r["median_cpu_ms"]) for r in same}
        own = cpu[row["peer"]]
        cells = [row["case"], row["threads"], row["malloc"], row["peer"], row["rounds"], f"{own:.3g}"]
        cells += [
            f"{own * 1e6 / int(row['elements']):.2f}",
            f"{cpu[REFERENCE] / own:.2f}",
            f"{own / cpu[BASELINE]:.2f}",
        ]
        found.append(tuple(cells))
    return found


def not_run(rows: Sequence[Row]) -> str:
    """Cases, numbers of threads and settings of malloc without a row."""
    there = {(row["case"], row["threads"], row["malloc"]) for row in rows}
    missing = [
        f"{case.name} ({threads} thread{'s' if threads == '2' else ''}, malloc {malloc})"
        for case in CASES
        for threads in ("1", "2")
        for malloc in MALLOCS
        if (case.name, threads, malloc) not in there
    ]
    return ", ".join(missing) or "nothing"


def _split_table(shares: Sequence[Row]) -> list[tuple[str, ...]]:
    found = []
    for case, backend in dict.fromkeys((row["case"], row["backend"]) for row in shares):
        mine = {row["part"]: float(row["cpu_ms"]) for row in shares if (row["case"], row["backend"]) == (case, backend)}
        found.append((case, backend, *(f"{mine[p]:.2f}" for p in split.PARTS), f"{sum(mine.values()):.2f}"))
    return found


def _scaling_text(points: Sequence[Row]) -> str:
    largest = [row for row in points if row["sweep"] == "elements"]
    if not largest:
        return "Not run."
    n = max(int(row["elements"]) for row in largest)
    cells = [
        (_STYLES[row["peer"]][0], f"{float(row['median_cpu_ms']) * 1e6 / n:.2f}")
        for row in largest
        if int(row["elements"]) == n
    ]
    return f"One tensor of {n:,} elements:\n\n" + _table(("peer", "ns/element"), cells)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ---------------------------------------------------------------- the picture


def picture(points: Sequence[Row]) -> Figure:
    """Cost of a step against elements of one tensor, and against the number of tensors of 5M elements."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    sizes: list[tuple[str, Callable[[Row], int], str]] = [
        ("elements", lambda row: int(row["elements"]), "elements in one tensor"),
        ("tensors", lambda row: int(row["tensors"]), "tensors, 5 million elements in all"),
    ]
    for axes, (sweep, size, label) in zip((left, right), sizes, strict=True):
        for peer, (name, colour, marker, line) in _STYLES.items():
            mine = sorted(
                (size(r), float(r["median_cpu_ms"])) for r in points if (r["sweep"], r["peer"]) == (sweep, peer)
            )
            if mine:
                axes.plot(*zip(*mine, strict=True), color=colour, marker=marker, linestyle=line, label=name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(label)
        axes.set_ylabel("processor time of a step (ms)")
        axes.grid(True, which="major", alpha=0.3)
    left.legend()
    return figure


if __name__ == "__main__":
    sys.exit(main())
