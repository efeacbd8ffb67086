"""The report: the tables inside posterior.md are made anew from the files, the words around them are left alone."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.posterior import averaging, figures, limits, minilm, oneshot, tables, toys
from benchmarks.posterior.goals import goals_table

PAGE = "posterior.md"


def write(folder: Path) -> list[Path]:
    """Tables of `PAGE` (made if it is not there) and the pictures, in ``folder``."""
    page = folder / PAGE
    made = all_tables(folder)
    old = page.read_text(encoding="utf-8") if page.exists() else "".join(f"{_frame(name, '')}\n\n" for name in made)
    page.write_text(fill(old, made), encoding="utf-8")
    return [page, *figures.write(folder)]


def all_tables(folder: Path) -> dict[str, str]:
    """Every table by name."""
    toy_rows, rows = toys.ledger(folder).rows(), minilm.ledger(folder).rows()
    cuts, averaged = oneshot.ledger(folder).rows(), averaging.ledger(folder).rows()
    return {
        "goals": goals_table(toy_rows, rows, averaged),
        "truth": tables.truth_table(toy_rows),
        "adapter": tables.adapter_table(rows),
        "toy-basins": tables.toy_basin_table(toy_rows),
        "toy-knobs": tables.toy_knob_table(toy_rows),
        "basin": tables.basin_table(rows),
        "limits": tables.limit_table(limits.ledger(folder).rows()),
        "variations": tables.variation_table(rows),
        "full": tables.score_table(rows, "full"),
        "full-paired": tables.paired_table(rows, "full"),
        "over": tables.score_table(rows, "over"),
        "over-paired": tables.paired_table(rows, "over"),
        "sampled": tables.sampled_table(rows),
        "samples": tables.averaging_table(averaged),
        "pruning": tables.pruning_table(cuts),
    }


def fill(page: str, tables: dict[str, str]) -> str:
    """``page`` with the text between `<!-- table NAME -->` and `<!-- end -->` replaced by the table of that name.

    Raises:
        ValueError: the page asks for a table that does not exist.
    """

    def replace(found: re.Match[str]) -> str:
        name = found.group(1)
        if name not in tables:
            raise ValueError(f"there is no table {name!r}; there are {', '.join(tables)}")
        return _frame(name, tables[name])

    return re.sub(r"<!-- table ([\w-]+) -->.*?<!-- end -->", replace, page, flags=re.DOTALL)


def _frame(name: str, table: str) -> str:
    return f"<!-- table {name} -->\n{table}\n<!-- end -->"
