"""Studies whose results grow run by run, and what is made of these: intervals over seeds."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from benchmarks.machine import RESULTS, provenance

Key = Mapping[str, Any]  # what tells a run from the others: some columns of its rows
Run = Callable[[Key], Sequence[Mapping[str, Any]]]


def command(
    study: str,
    keys: Callable[[pd.DataFrame], Sequence[Key]],
    run: Run,
    page: Callable[[Path], str],
    argv: Sequence[str] | None = None,
) -> int:
    """Command line of a study; returns the exit status.

    Args:
        study: name of its CSV file in results/.
        keys: all runs, given the rows of those that are done.
        run: makes one run, and returns its rows.
        page: the report in Markdown, given the CSV file.
    """
    parser = argparse.ArgumentParser(description=f"fills results/{study}.csv run by run, and reports on it")
    parser.add_argument("--runs", type=int, default=1, help="how many of the missing runs to make (default: 1)")
    parser.add_argument("--report", action="store_true", help="write the report on the runs that are done")
    options, path = parser.parse_args(argv), RESULTS / f"{study}.csv"
    if options.report:
        path.with_suffix(".md").write_text(page(path), encoding="utf-8")
    else:
        resume(path, keys(read(path)), run, options.runs)
    return 0


def read(path: Path) -> pd.DataFrame:
    """All rows; an empty frame where there is no file."""
    if not path.exists():
        return pd.DataFrame()
    # pandas would read the commit 4e49581 as an infinite number, and one that is not known as NaN.
    return pd.read_csv(path, dtype={"torch": str, "commit": str}).fillna({"commit": ""})


def append(path: Path, rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Add the rows of one run, all or none, with the machine, the date and the commit; returns the whole file."""
    new = pd.DataFrame([{**row, **provenance()} for row in rows])
    frame = pd.concat([read(path), new], ignore_index=True) if path.exists() else new
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    frame.to_csv(draft, index=False, float_format="%.6g", lineterminator="\n")
    draft.replace(path)
    return frame


def has(rows: pd.DataFrame, **key: Any) -> bool:
    """Whether there is a row with these values."""
    if rows.empty:
        return False
    same = pd.Series(True, index=rows.index)
    for name, value in key.items():
        same &= rows[name] == value
    return bool(same.any())


def resume(path: Path, keys: Sequence[Key], run: Run, limit: int) -> None:
    """Make the first ``limit`` of the runs whose keys have no row yet, and say how many are left."""
    missing = [key for key in keys if not has(read(path), **key)]
    for key in missing[:limit]:
        append(path, run(key))
        print(*key.values(), flush=True)
    print(f"left: {max(0, len(missing) - limit)}")


def keep(path: Path, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Add arrays, named by `array_name`, to the archive beside a CSV file."""
    archive = path.with_suffix(".npz")
    kept = dict(np.load(archive)) if archive.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(archive, **{**kept, **arrays})


def array_name(*key: object) -> str:
    """Of what tells an array from the others: "small vadam 0.003 6 mean test"."""
    return " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in key)


def interval(values: pd.Series) -> tuple[float, float]:
    """Mean, and half of its 95 % interval by Student's t over the values that are not NaN (NaN for fewer than two)."""
    values = values.dropna()
    n = len(values)
    half = stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan
    return float(values.mean()), float(half)


def paired(rows: pd.DataFrame, metric: str, by: str, reference: str) -> dict[str, pd.Series]:
    """For every other value of column ``by``: its metric minus that of ``reference``, seed by seed, where both are."""
    wide = rows.pivot_table(index="seed", columns=by, values=metric, sort=False)
    others = [name for name in wide.columns if name != reference] if reference in wide else []
    return {name: (wide[name] - wide[reference]).dropna() for name in others}


def show(values: pd.Series, sign: bool = False) -> str:
    """Mean ± half width; the mean alone for one value, nothing for none."""
    mean, half = interval(values)
    if math.isnan(mean):
        return ""
    text = f"{mean:+.4f}" if sign else f"{mean:.4f}"
    return text if math.isnan(half) else f"{text} ± {half:.4f}"
