"""Labelled texts as a table, their split, and the order in which training sees them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.utils.data import IterableDataset

from ivon_lora.cli.errors import InputError, input_errors
from ivon_lora.cli.finetune.reviews import film_reviews

__all__ = ["Texts", "TrainingStream", "load_texts", "tokenized", "training_texts"]

# Upper ends, in percent, of the ranges of the hash that go to the training and to the validation split.
TRAIN_BELOW, VALIDATION_BELOW = 70, 80
MAX_LABELS = 1000
POOL = 50  # batches whose texts are sorted by length together: little padding, and the order is still random


@dataclass(frozen=True)
class Texts:
    """Texts with their classes.

    Attributes:
        source: where they come from, for people.
        labels: names of the classes.
        table: columns ``text``, ``label`` (number of the class) and ``split``: "train", "validation", "test" or
            "shifted", a second test set from another source. Every split is in the order of a hash, so that any part
            from its beginning is a random one.
    """

    source: str
    labels: tuple[str, ...]
    table: pd.DataFrame

    def split(self, name: str) -> pd.DataFrame:
        """The rows of one split; empty if there is none of this name."""
        return self.table[self.table["split"] == name]

    def counts(self) -> dict[str, int]:
        """Number of texts in each split."""
        return {str(name): int(count) for name, count in self.table["split"].value_counts(sort=False).items()}

    def fingerprint(self) -> str:
        """sha256 of labels, texts and splits: equal for equal data."""
        content = json.dumps([self.labels, self.table[["text", "label", "split"]].to_numpy().tolist()])
        return hashlib.sha256(content.encode()).hexdigest()


def load_texts(data: str | None, text: str = "text", label: str = "label") -> Texts:
    """The film reviews, or the texts of a file.

    Args:
        data: .csv with a header line or .jsonl, UTF-8; None for the reviews.
        text: column with the text.
        label: column with the class; its values are numbered in sorted order.

    Raises:
        InputError: unreadable file, missing column, empty text or label, fewer than two classes, too few texts.
    """
    if data is None:
        films, shop = film_reviews()
        table = pd.concat([_split(films), _by_hash(shop).assign(split="shifted")])
        return Texts("film reviews (vaderSentiment 3.3.2)", ("negative", "positive"), table)
    table = _columns(data, {"text": text, "label": label})
    names = table["label"].str.strip()
    labels = _sorted_labels(names.unique().tolist())
    if len(labels) < 2:
        raise InputError(f"--data {data}: one class only ({labels[0]!r} in column {label!r}); give two or more")
    if len(labels) > MAX_LABELS or (len(names) > 20 and len(labels) > len(names) / 2):
        raise InputError(
            f"--data {data}: column {label!r} has {len(labels)} different values in {len(names)} rows, too many for "
            "classes; set --label to the column with the class"
        )
    texts = Texts(f"--data {data}", labels, _split(table.assign(label=names.map(labels.index))))
    counts = ", ".join(f"{len(texts.split(name))} for {name}" for name in ("train", "validation", "test"))
    if texts.split("train").empty or texts.split("test").empty:
        raise InputError(f"--data {data}: too few different texts to split ({counts}); give at least some dozens")
    missing = set(range(len(labels))) - set(texts.split("train")["label"])
    if missing:
        raise InputError(
            f"--data {data}: no training text has the label {labels[min(missing)]!r} ({counts}); add texts with this "
            "label or drop it"
        )
    return texts


def training_texts(data: str | None, text: str) -> list[str]:
    """The texts that `finetune` would train on; no column of labels is needed. Arguments and errors as `load_texts`."""
    table = load_texts(None).table if data is None else _split(_columns(data, {"text": text}))
    found: list[str] = table.loc[table["split"] == "train", "text"].tolist()
    if not found:
        raise InputError(f"--data {data}: {len(table)} different texts are too few to train on; give some dozens")
    return found


def tokenized(rows: pd.DataFrame, tokenizer: Any, max_length: int) -> list[dict[str, Any]]:
    """Rows as the Trainer takes them: ``input_ids`` and ``attention_mask`` without padding, ``labels``."""
    if rows.empty:
        return []
    encoded = tokenizer(rows["text"].tolist(), truncation=True, max_length=max_length)
    columns = (encoded["input_ids"], encoded["attention_mask"], rows["label"].tolist())
    return [
        dict(zip(("input_ids", "attention_mask", "labels"), row, strict=True)) for row in zip(*columns, strict=True)
    ]


class TrainingStream(IterableDataset[dict[str, Any]]):
    """The examples of a whole run in their order: epoch after epoch, shuffled, in batches of like length.

    The order is a function of the arguments, so a resumed run goes on with the examples that come next.

    Args:
        examples: of `tokenized`.
        batch_size: examples a step.
        steps: steps of the run.
        seed: of the order.
    """

    def __init__(self, examples: Sequence[dict[str, Any]], batch_size: int, steps: int, seed: int) -> None:
        self.examples = examples
        generator = torch.Generator().manual_seed(seed)
        total, count = steps * batch_size, len(examples)
        epochs = [torch.randperm(count, generator=generator) for _ in range(math.ceil(total / count))]
        pool = batch_size * max(1, min(POOL, count // batch_size))
        self.order: list[int] = []
        for part in torch.cat(epochs)[:total].split(pool):
            ids = sorted(part.tolist(), key=lambda i: len(examples[i]["input_ids"]))
            shuffled = torch.randperm(len(ids) // batch_size, generator=generator).tolist()
            self.order += [i for batch in shuffled for i in ids[batch * batch_size : (batch + 1) * batch_size]]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self.examples[i] for i in self.order)


def _columns(data: str, columns: dict[str, str]) -> pd.DataFrame:
    """The columns of a file under the names of the options that say which they are; every value is a string."""
    table = _read(Path(data))
    if table.empty:
        raise InputError(f"--data {data}: the file has no rows; give one with texts and labels")
    for option, column in columns.items():
        if column not in table:
            there = ", ".join(map(repr, table.columns))
            raise InputError(f"--data {data}: no column {column!r}; it has {there}: set --{option}")
        structured = table[column].map(lambda value: isinstance(value, (dict, list)))
        empty = table[column].isna() | (table[column].astype(str).str.strip() == "")
        for wrong, what in ((structured, "not a single value"), (empty, "empty")):
            if wrong.any():
                line = table.index[wrong.argmax()]
                raise InputError(f"--data {data}, row {line}: the {option} (column {column!r}) is {what}; correct it")
    return pd.DataFrame({option: table[column].astype(str) for option, column in columns.items()})


def _read(path: Path) -> pd.DataFrame:
    """A file as a table, rows numbered from 1."""
    if path.suffix.lower() not in (".csv", ".jsonl"):
        raise InputError(f"--data {path}: unknown kind of file; give a .csv with a header line or a .jsonl")
    with input_errors(f"--data {path} cannot be read"):
        if path.suffix.lower() == ".jsonl":
            rows = list(_json_lines(path))
            return pd.DataFrame(rows, index=range(1, len(rows) + 1), dtype=object)
        try:
            table = pd.read_csv(path, encoding="utf-8-sig", dtype=str, keep_default_na=False, index_col=False)
        except pd.errors.EmptyDataError:
            return pd.DataFrame()
        return table.set_axis(range(1, len(table) + 1))


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"--data {path}, line {number}: not JSON ({error}); correct the line") from None
        if not isinstance(row, dict):
            raise InputError(f"--data {path}, line {number}: not a JSON object; write one object a line")
        yield row


def _by_hash(table: pd.DataFrame) -> pd.DataFrame:
    """Rows in the order of sha256(lower-cased words, single spaces); of texts that differ in less the first is kept."""
    keys = table["text"].str.lower().str.split().str.join(" ")
    digests = keys.map(lambda key: hashlib.sha256(key.encode()).hexdigest())
    return table.assign(digest=digests).drop_duplicates("digest").sort_values("digest", ignore_index=True)


def _split(table: pd.DataFrame) -> pd.DataFrame:
    """With the split of every row: ``int(digest[:8], 16) % 100`` below 70 trains, below 80 validates, else tests."""
    table = _by_hash(table)
    percent = table["digest"].map(lambda digest: int(digest[:8], 16) % 100)
    names = ["train", "validation", "test"]
    bins = [-1, TRAIN_BELOW - 1, VALIDATION_BELOW - 1, 99]
    return table.assign(split=pd.cut(percent, bins, labels=names).astype(str))


def _sorted_labels(names: list[str]) -> tuple[str, ...]:
    """As numbers if all are numbers, else as words."""
    try:
        return tuple(sorted(names, key=float))
    except ValueError:
        return tuple(sorted(names))
