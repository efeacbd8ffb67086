"""Labelled sentences, and the split into train, validation and test that depends on the text alone."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from ivon_lora.finetune.errors import InputError

__all__ = ["Corpus", "Row", "build_corpus", "rows_by_digest", "text_key"]

# Upper ends, in percent, of the ranges of the hash that go to the training and to the validation split.
TRAIN_BELOW = 70
VALIDATION_BELOW = 80


@dataclass(frozen=True)
class Row:
    """One sentence and the number of its class."""

    text: str
    label: int


@dataclass(frozen=True)
class Corpus:
    """Sentences for training and evaluation.

    ``shifted`` is a second test set from another source (None where there is none); ``labels[i]`` names class i.
    The rows of every split are in the order of their hash, so any prefix of them is a random subset.
    """

    source: str
    labels: tuple[str, ...]
    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    test: tuple[Row, ...]
    shifted: tuple[Row, ...] | None = None


def text_key(text: str) -> str:
    """What makes two sentences the same one: the lower-cased words, joined by single spaces."""
    return " ".join(text.lower().split())


def rows_by_digest(rows: Iterable[Row]) -> list[tuple[str, Row]]:
    """(sha256 of the key, row) in the order of the hash; of rows with one key the first is kept."""
    kept: dict[str, Row] = {}
    for row in rows:
        kept.setdefault(hashlib.sha256(text_key(row.text).encode()).hexdigest(), row)
    return sorted(kept.items())


def build_corpus(
    source: str, rows: Iterable[Row], labels: tuple[str, ...], shifted: Iterable[Row] | None = None
) -> Corpus:
    """Drop duplicates and split: ``int(sha256(key)[:8], 16) % 100`` below 70 trains, below 80 validates, else tests.

    Raises:
        InputError: if a split would be empty, or a class would be missing from the training split.
    """
    train: list[Row] = []
    validation: list[Row] = []
    test: list[Row] = []
    for digest, row in rows_by_digest(rows):
        percent = int(digest[:8], 16) % 100
        split = train if percent < TRAIN_BELOW else validation if percent < VALIDATION_BELOW else test
        split.append(row)
    counts = f"{len(train)} for training, {len(validation)} for validation, {len(test)} for test"
    if not train or not test:
        raise InputError(f"{source}: too few different texts to split ({counts}); give at least some dozens")
    present = Counter(row.label for row in train)
    missing = [name for number, name in enumerate(labels) if number not in present]
    if missing:
        raise InputError(
            f"{source}: no training text has the label {missing[0]!r} ({counts}); add texts with this label or drop it"
        )
    moved = None if shifted is None else tuple(row for _, row in rows_by_digest(shifted))
    return Corpus(source, labels, tuple(train), tuple(validation), tuple(test), moved)
