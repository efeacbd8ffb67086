"""The report: the tables inside posterior.md are made anew from the files, the words around them are left alone."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.posterior import figures
from benchmarks.posterior.tables import all_tables

PAGE = "posterior.md"


def write(folder: Path) -> list[Path]:
    """Tables of `PAGE` (made if it is not there) and the pictures, in ``folder``."""
    page = folder / PAGE
    tables = all_tables(folder)
    old = page.read_text(encoding="utf-8") if page.exists() else "".join(f"{_frame(name, '')}\n\n" for name in tables)
    page.write_text(fill(old, tables), encoding="utf-8")
    return [page, *figures.write(folder)]


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
