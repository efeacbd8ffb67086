"""The rows of the study of ranks: a CSV file that grows run by run."""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One run; the fields are the columns.

    Metrics at the mean of the weights on ``n`` sentences of ``split``; ``train_loss`` is the mean over the last 25
    steps. Times are milliseconds of processor time a step on one thread: the median of forward and backward pass, and
    the mean of the optimizer with its pruner (a mean because pruners work in some steps only). ``options`` are the
    optimizer's own (`benchmarks.rank_methods.options_of`).
    """

    method: str
    seed: int
    split: str
    steps: int
    lr: str
    options: str
    n: int
    accuracy: float
    nll: float
    ece: float
    brier: float
    train_loss: float
    ranks: int
    passes_cpu_ms: float
    optimizer_cpu_ms: float
    ranks_by_layer: str
    torch: str
    precision: str
    machine: str
    date: str
    commit: str

    @property
    def key(self) -> tuple[str, int, str, int, str, str]:
        """What makes two runs the same one."""
        return self.method, self.seed, self.split, self.steps, self.lr, self.options


COLUMNS = tuple(field.name for field in fields(Row))


def append(path: Path, row: Row) -> None:
    """Add a row at the end of the file, which is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow({name: f"{v:.5g}" if isinstance(v, float) else v for name, v in asdict(row).items()})


def read(path: Path) -> list[Row]:
    """All rows; none where there is no file.

    Raises:
        ValueError: the columns are not those of `Row`.
    """
    if not path.exists():
        return []
    kinds = {"int": int, "float": float, "str": str}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} has the columns {reader.fieldnames}, expected {list(COLUMNS)}")
        return [Row(**{f.name: kinds[str(f.type)](line[f.name]) for f in fields(Row)}) for line in reader]
