"""Evidence about the posterior and the defaults, in stages that can be stopped, resumed and run one by one.

    python -m benchmarks.posterior --stage toys       # truth beds and basins of logistic regression and a small MLP
    python -m benchmarks.posterior --stage minilm     # LoRA on film reviews (--list, --only TEXT, --seconds N)
    python -m benchmarks.posterior --stage averaging  # the same adapters: how many samples does a prediction need?
    python -m benchmarks.posterior --stage limits     # how large a learning rate does a fresh adapter bear?
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
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TypeVar

from benchmarks.machine import ROOT
from benchmarks.posterior import averaging, limits, minilm, plan, report, toys
from benchmarks.posterior.ledger import Ledger

RESULTS = ROOT / "benchmarks" / "results"
S = TypeVar("S", plan.ToyStep, plan.MiniLMStep, plan.AveragingStep, plan.LimitStep)
STAGES = ("toys", "minilm", "averaging", "limits", "report")


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
    if options.stage == "toys":
        return run_stage(toys.ledger(options.out), plan.toy_runs(), toy_stage, options)
    if options.stage == "averaging":
        return run_stage(averaging.ledger(options.out), plan.averaging_runs(), averaging_stage, options)
    if options.stage == "limits":
        execute = partial(limit_stage, wide=options.wide)
        return run_stage(limits.ledger(options.out), plan.limit_runs(), execute, options)
    return run_stage(minilm.ledger(options.out), plan.minilm_runs(), minilm_stage, options)


def toy_stage(book: Ledger, step: plan.ToyStep, folder: Path) -> str:
    """Make a run on a small bed; returns what its row says."""
    toys.execute(step.run, folder, step.curvature)
    row = book.rows()[-1]
    return f"NLL {row['nll']}, accuracy {row['accuracy']}, {row['seconds']} s"


def minilm_stage(book: Ledger, step: plan.MiniLMStep, folder: Path) -> str:
    """Make a run on MiniLM; returns what its row says."""
    minilm.execute(step.run, folder, minilm.Sizes(), step.samples, step.fisher, step.prune)
    row, where = book.rows()[-1], step.run.split
    return f"NLL {row[f'{where}_nll']}, accuracy {row[f'{where}_accuracy']}, {row['seconds']} s"


def averaging_stage(book: Ledger, step: plan.AveragingStep, folder: Path) -> str:
    """Average over the samples of a trained adapter; returns what the last row says."""
    averaging.execute(step.run, folder, minilm.Sizes())
    row = book.rows()[-1]
    return f"NLL of {row['samples']} samples {row['test_nll']}, accuracy {row['test_accuracy']}, {row['seconds']} s"


def limit_stage(book: Ledger, step: plan.LimitStep, folder: Path, wide: str) -> str:
    """Train an adapter; returns what its row says."""
    limits.execute(step.run, folder, wide)
    row = book.rows()[-1]
    return f"NLL {row['validation_nll']}, accuracy {row['validation_accuracy']}, {row['seconds']} s"


def run_stage(
    book: Ledger, steps: Sequence[S], execute: Callable[[Ledger, S, Path], str], options: argparse.Namespace
) -> int:
    """Make the missing ones of ``steps`` whose label contains ``--only`` until ``--seconds`` are over, or list them."""
    wanted = [step for step in steps if options.only in label(step.run)]
    missing = [step for step in wanted if not book.has(asdict(step.run))]
    if options.list:
        for step in wanted:
            print("missing" if step in missing else "done   ", label(step.run))
        return 0
    start = time.monotonic()
    for step in missing:
        if time.monotonic() - start > options.seconds:
            break
        print(f"{label(step.run)}: {execute(book, step, options.out)}", flush=True)
    print(f"left: {sum(not book.has(asdict(step.run)) for step in missing)}", flush=True)
    return 0


def report_stage(folder: Path) -> int:
    """Write tables and pictures beside the files."""
    for written in report.write(folder):
        print(f"written: {written}")
    return 0


def label(run: toys.Run | minilm.Run | averaging.Run | limits.Run) -> str:
    """The run's key in one line."""
    return " ".join(str(value) for value in asdict(run).values() if value != "")


def quick(folder: Path) -> int:
    """Little runs of every kind, and the report on them."""
    for toy in plan.quick_toy_runs():
        toys.execute(toy.run, folder, toy.curvature)
    for step in plan.quick_minilm_runs():
        minilm.execute(step.run, folder, minilm.QUICK_SIZES, step.samples, step.fisher, step.prune)
    for one in plan.quick_averaging_runs():
        averaging.execute(one.run, folder, minilm.QUICK_SIZES)
    for start in plan.quick_limit_runs():
        limits.execute(start.run, folder, sizes=minilm.QUICK_SIZES)
    report_stage(folder)
    print((folder / report.PAGE).read_text(encoding="utf-8"))
    print("it works; the numbers mean nothing")
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
    parser.add_argument("--wide", default=limits.WIDE, help="folder, or name on the hub, of all-mpnet-base-v2 (limits)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the files (default: in results/)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
