"""A CSV file that grows by one row per run; what is in it is not run again."""

from __future__ import annotations

import csv
import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_commit

#: columns that every ledger ends with
PROVENANCE = ("seconds", "date", "commit")


@dataclass(frozen=True)
class Ledger:
    """Rows of one kind of run.

    Args:
        path: the file; made with the first row.
        key: columns that make two runs the same one.
        results: columns of what was measured; empty cells where a run does not have the number.
    """

    path: Path
    key: tuple[str, ...]
    results: tuple[str, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the file, in order."""
        return (*self.key, *self.results, *PROVENANCE)

    def rows(self) -> list[dict[str, str]]:
        """All rows as text; none where there is no file.

        Raises:
            ValueError: the columns are not those of this ledger.
        """
        if not self.path.exists():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != self.columns:
                raise ValueError(f"{self.path} has the columns {reader.fieldnames}, expected {list(self.columns)}")
            return list(reader)

    def has(self, key: Mapping[str, Any]) -> bool:
        """Whether a run of this key is finished."""
        wanted = tuple(_cell(key[name]) for name in self.key)
        return any(tuple(row[name] for name in self.key) == wanted for row in self.rows())

    def append(self, key: Mapping[str, Any], results: Mapping[str, Any], seconds: float) -> None:
        """Add one row.

        Raises:
            ValueError: a result that is no column.
        """
        unknown = set(results) - set(self.results)
        if unknown:
            raise ValueError(f"{self.path.name} has no columns {sorted(unknown)}; it has {list(self.results)}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.exists()
        date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        values = {**key, **results, "seconds": seconds, "date": date, "commit": describe_commit()}
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(self.columns)
            writer.writerow([_cell(values.get(name, "")) for name in self.columns])


def select(rows: Sequence[dict[str, str]], **wanted: object) -> list[dict[str, str]]:
    """The rows whose cells are the wanted values."""
    return [row for row in rows if all(row[name] == _cell(value) for name, value in wanted.items())]


def _cell(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
