"""Examples in splits that a hash decides, and reading them line by line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ivon_lora.cli.errors import InputError, input_errors


@dataclass(frozen=True)
class Examples:
    """What a run is trained and tested on.

    Attributes:
        source: where it comes from, for people.
        splits: a table for "train", "test" and, where there is one, for "validation" and "shifted" (a test set
            from another source). Any part from its beginning is a random one.
        labels: names of the classes, if there are classes.
    """

    source: str
    splits: dict[str, pd.DataFrame]
    labels: tuple[str, ...] = ()

    def counts(self) -> dict[str, int]:
        """Number of examples in each split."""
        return {name: len(table) for name, table in self.splits.items()}

    def fingerprint(self) -> str:
        """sha256 of labels, examples and splits: equal for equal data."""
        rows = {name: table.to_numpy().tolist() for name, table in self.splits.items()}
        return hashlib.sha256(json.dumps([self.labels, rows]).encode()).hexdigest()


PERCENTS = {"train": range(70), "validation": range(70, 80), "test": range(80, 100)}


def split(table: pd.DataFrame, keys: pd.Series, percents: Mapping[str, range] = PERCENTS) -> dict[str, pd.DataFrame]:
    """The rows that have a key (the index says whose it is), in the order of sha256(key).

    The first 8 digits of the hash, a hexadecimal number modulo 100, say in which split's ``percents`` a row lies.
    """
    digests = keys.map(lambda key: hashlib.sha256(key.encode()).hexdigest()).sort_values(kind="stable")
    percent = digests.map(lambda digest: int(digest[:8], 16) % 100)
    return {name: table.loc[percent.index[percent.isin(part)]] for name, part in percents.items()}


def json_lines(path: Path, source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and object of every line that is not empty. InputError for a line that is no JSON object."""
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if line.strip():
            with input_errors(f"{source}, line {number}: not a JSON object"):
                found = json.loads(line)
                if not isinstance(found, dict):
                    raise InputError(f"{source}, line {number}: not a JSON object, but {line.strip():.40}")
                json.dumps(found, ensure_ascii=False).encode()  # halves of characters are no text
            yield number, found
