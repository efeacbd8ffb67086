"""Evidence about the posterior and the defaults, in stages that can be stopped, resumed and run one by one.

    python -m benchmarks.posterior --stage toys       # truth beds and basins of logistic regression and a small MLP
    python -m benchmarks.posterior --stage minilm     # LoRA on film reviews: --list shows the runs, --runs N makes N
    python -m benchmarks.posterior --stage report     # posterior.md's tables and the pictures, from the CSV files
    python -m benchmarks.posterior --quick            # a little of everything into a folder that is thrown away

A run appends one row to a file in benchmarks/results/; a row that is there is not run again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.machine import ROOT
from benchmarks.posterior import minilm, plan

RESULTS = ROOT / "benchmarks" / "results"
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
    if options.stage == "minilm":
        return minilm_stage(options.out, options.only, options.runs, options.list)
    raise NotImplementedError(options.stage)


def minilm_stage(folder: Path, only: str, runs: int, show: bool) -> int:
    """Make the next ``runs`` runs of the plan whose label contains ``only``, or list them."""
    book = minilm.ledger(folder)
    wanted = [step for step in plan.minilm_runs() if only in step.run.label]
    if show:
        for step in wanted:
            print("done   " if book.has(asdict(step.run)) else "missing", step.run.label)
        return 0
    missing = [step for step in wanted if not book.has(asdict(step.run))]
    for step in missing[:runs]:
        minilm.execute(step.run, folder, minilm.Sizes(), step.samples, step.fisher, step.prune)
        row = book.rows()[-1]
        where = step.run.split
        print(f"{step.run.label}: NLL {row[f'{where}_nll']}, accuracy {row[f'{where}_accuracy']}, {row['seconds']} s")
    print(f"left: {max(0, len(missing) - runs)}", flush=True)
    return 0


def quick(folder: Path) -> int:
    """Little runs of every stage."""
    raise NotImplementedError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.posterior", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", choices=STAGES, help="what to do")
    parser.add_argument("--quick", action="store_true", help="a little of everything into a scratch folder")
    parser.add_argument("--only", metavar="TEXT", default="", help="only runs of the stage whose label contains this")
    parser.add_argument("--runs", type=int, default=1, help="how many of the missing runs to make (default: 1)")
    parser.add_argument("--list", action="store_true", help="say which runs are done")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the files (default: in results/)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
