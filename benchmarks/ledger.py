"""CSV files that grow run by run, and what is made of them: intervals over seeds and tables in Markdown."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from scipy import stats

from benchmarks.machine import provenance


def arguments(study: str) -> argparse.ArgumentParser:
    """The parser of a study whose file grows run by run."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{study}")
    parser.add_argument("--runs", type=int, default=1, help="how many of the missing runs to make (default: 1)")
    parser.add_argument("--report", action="store_true", help="write the report on the runs that are done")
    return parser


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


def resume(
    path: Path,
    keys: Sequence[Mapping[str, Any]],
    run: Callable[[Mapping[str, Any]], Sequence[Mapping[str, Any]]],
    limit: int,
) -> None:
    """Make the first ``limit`` of the runs whose keys have no row yet, and say how many are left."""
    missing = [key for key in keys if not has(read(path), **key)]
    for key in missing[:limit]:
        rows = run(key)
        append(path, rows)
        print(*key.values(), f"NLL {rows[0]['nll']:.4f}", flush=True)
    print(f"left: {max(0, len(missing) - limit)}")


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


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
