"""Evidence about the posterior and the defaults, in stages that can be stopped, resumed and run one by one.

    python -m benchmarks.posterior --stage toys       # truth beds and basins of logistic regression and a small MLP
    python -m benchmarks.posterior --stage minilm     # LoRA on film reviews (--list, --only TEXT, --seconds N)
    python -m benchmarks.posterior --stage report     # posterior.md's tables and the pictures, from the CSV files
    python -m benchmarks.posterior --quick            # a little of everything into a folder that is thrown away

A run appends one row to a file in benchmarks/results/; a row that is there is not run again.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from benchmarks.machine import ROOT
from benchmarks.posterior import minilm, plan, report, toys

RESULTS = ROOT / "benchmarks" / "results"
S = TypeVar("S")
STAGES = ("toys", "minilm", "report")


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.quick:
        with tempfile.TemporaryDirectory() as folder:
            return quick(Path(folder))
    if options.stage is None:
        parser.error("choose a --stage, or --quick")
    if options.stage == "report":
        return report_stage(options.out)
    stage = toy_stage if options.stage == "toys" else minilm_stage
    return stage(options.out, options.only, options.seconds, options.list)


def toy_stage(folder: Path, only: str, seconds: float, show: bool) -> int:
    """Make missing runs of the plan whose label contains ``only`` until ``seconds`` are over, or list them."""
    book = toys.ledger(folder)
    wanted = [step for step in plan.toy_runs() if only in label(step.run)]
    missing = [step for step in wanted if not book.has(asdict(step.run))]
    if show:
        return _show(wanted, missing)
    for step in _until(seconds, missing):
        toys.execute(step.run, folder, step.curvature)
        row = book.rows()[-1]
        print(f"{label(step.run)}: NLL {row['nll']}, accuracy {row['accuracy']}, {row['seconds']} s")
    return _left(sum(not book.has(asdict(step.run)) for step in missing))


def minilm_stage(folder: Path, only: str, seconds: float, show: bool) -> int:
    """Make missing runs of the plan whose label contains ``only`` until ``seconds`` are over, or list them."""
    book = minilm.ledger(folder)
    wanted = [step for step in plan.minilm_runs() if only in label(step.run)]
    missing = [step for step in wanted if not book.has(asdict(step.run))]
    if show:
        return _show(wanted, missing)
    for step in _until(seconds, missing):
        minilm.execute(step.run, folder, minilm.Sizes(), step.samples, step.fisher, step.prune)
        row, where = book.rows()[-1], step.run.split
        print(f"{label(step.run)}: NLL {row[f'{where}_nll']}, accuracy {row[f'{where}_accuracy']}, {row['seconds']} s")
    return _left(sum(not book.has(asdict(step.run)) for step in missing))


def report_stage(folder: Path) -> int:
    """Write tables and pictures beside the files."""
    for written in report.write(folder):
        print(f"written: {written}")
    return 0


def label(run: toys.Run | minilm.Run) -> str:
    """The run's key in one line."""
    return " ".join(str(value) for value in asdict(run).values() if value != "")


def quick(folder: Path) -> int:
    """Little runs of every kind, and the report on them."""
    for toy in plan.quick_toy_runs():
        toys.execute(toy.run, folder, toy.curvature)
    for step in plan.quick_minilm_runs():
        minilm.execute(step.run, folder, minilm.QUICK_SIZES, step.samples, step.fisher, step.prune)
    report_stage(folder)
    print((folder / report.PAGE).read_text(encoding="utf-8"))
    print("it works; the numbers mean nothing")
    return 0


def _show(wanted: Sequence[plan.ToyStep] | Sequence[plan.MiniLMStep], missing: Sequence[object]) -> int:
    for step in wanted:
        print("missing" if step in missing else "done   ", label(step.run))
    return 0


def _until(seconds: float, steps: Sequence[S]) -> Iterator[S]:
    """The steps, as long as the time has not come."""
    start = time.monotonic()
    for step in steps:
        if time.monotonic() - start > seconds:
            return
        yield step


def _left(count: int) -> int:
    print(f"left: {count}", flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.posterior", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", choices=STAGES, help="what to do")
    parser.add_argument("--quick", action="store_true", help="a little of everything into a scratch folder")
    parser.add_argument("--only", metavar="TEXT", default="", help="only runs of the stage whose label contains this")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no run after this time (default: none)")
    parser.add_argument("--list", action="store_true", help="say which runs are done")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the files (default: in results/)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
