"""Labelled texts as a table, their split, and the order in which training sees them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from ivon_lora.cli.dataset import PERCENTS, Examples, json_lines, split
from ivon_lora.cli.errors import InputError, input_errors
from ivon_lora.cli.finetune.reviews import film_reviews

MAX_LABELS = 1000
POOL = 50  # batches whose texts are sorted by length together: little padding, and the order is still random


def load_texts(data: str | None, text: str = "text", label: str = "label") -> Examples:
    """The film reviews, or the texts of a .csv with a header line or a .jsonl, UTF-8; its classes in sorted order.

    Raises:
        InputError: unreadable file, missing column, empty text or label, fewer than two classes, too few texts.
    """
    if data is None:
        films, shop = film_reviews()
        splits = {**_split(films), **_split(shop, {"shifted": range(100)})}
        return Examples("film reviews (vaderSentiment 3.3.2)", splits, ("negative", "positive"))
    table = _columns(data, {"text": text, "label": label})
    names = table["label"].str.strip()
    labels = tuple(sorted(names.unique()))
    with contextlib.suppress(ValueError):
        labels = tuple(sorted(labels, key=float))
    if len(labels) < 2:
        raise InputError(f"--data {data}: one class only ({labels[0]!r} in column {label!r}); give two or more")
    if len(labels) > MAX_LABELS or (len(names) > 20 and len(labels) > len(names) / 2):
        many = f"{len(labels)} different values in {len(names)} rows, too many for classes"
        raise InputError(f"--data {data}: column {label!r} has {many}; set --label to the column with the class")
    texts = Examples(f"--data {data}", _split(table.assign(label=names.map(labels.index))), labels)
    missing = set(range(len(labels))) - set(texts.splits["train"]["label"])
    if missing or 0 in texts.counts().values():
        what = f"no training text has the label {labels[min(missing)]!r}" if missing else "no text is left for a split"
        raise InputError(f"--data {data}: {what} of {texts.counts()} different texts; give more")
    return texts


def training_texts(data: str | None, text: str) -> list[str]:
    """The texts that `finetune` would train on; no column of labels is needed."""
    splits = load_texts(None).splits if data is None else _split(_columns(data, {"text": text}))
    found: list[str] = splits["train"]["text"].tolist()
    if not found:
        count = sum(map(len, splits.values()))
        raise InputError(f"--data {data}: of {count} different texts none is left to train on; give some dozens")
    return found


def tokenized(texts: pd.DataFrame, tokenizer: Any, max_length: int) -> list[dict[str, Any]]:
    """Examples as the Trainer takes them: ``input_ids`` and ``attention_mask`` without padding, ``labels``."""
    encoded = tokenizer(texts["text"].tolist(), truncation=True, max_length=max_length)
    columns = {name: encoded[name] for name in ("input_ids", "attention_mask")} | {"labels": texts["label"].tolist()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def in_order(examples: Sequence[dict[str, Any]], batch_size: int, steps: int, seed: int) -> list[dict[str, Any]]:
    """The examples of a whole run: epoch after epoch, shuffled, in batches of like length.

    The order is a function of the arguments, so a resumed run goes on with the examples that come next. (The Trainer's
    own grouping by length has another order after a resume, and its random order pads to twice the length.)
    """
    generator, count, total = torch.Generator().manual_seed(seed), len(examples), steps * batch_size
    epochs = [torch.randperm(count, generator=generator) for _ in range(math.ceil(total / count))]
    order: list[int] = []
    for part in torch.cat(epochs)[:total].split(batch_size * max(1, min(POOL, count // batch_size))):
        ids = sorted(part.tolist(), key=lambda i: len(examples[i]["input_ids"]))
        shuffled = torch.randperm(len(ids) // batch_size, generator=generator).tolist()
        order += [i for batch in shuffled for i in ids[batch * batch_size : (batch + 1) * batch_size]]
    return [examples[i] for i in order]


def _columns(data: str, columns: dict[str, str]) -> pd.DataFrame:
    """The columns of a file under the names of the options that say which they are; every value is a string."""
    path = Path(data)
    kind = path.suffix.lower()
    if kind not in (".csv", ".jsonl"):
        raise InputError(f"--data {data}: unknown kind of file; give a .csv with a header line or a .jsonl")
    with input_errors(f"--data {data} cannot be read"):
        rows = [] if kind == ".csv" else [row for _, row in json_lines(path, f"--data {data}")]
        table = _read_csv(path) if kind == ".csv" else pd.DataFrame(rows, dtype=object)
    if table.empty:
        raise InputError(f"--data {data}: the file has no rows; give one with texts and labels")
    for option, column in columns.items():
        if column not in table:
            there = ", ".join(map(repr, table.columns))
            raise InputError(f"--data {data}: no column {column!r}; it has {there}: set --{option}")
        values = table[column]
        structured = values.map(lambda value: isinstance(value, (dict, list)))
        empty = values.isna() | (values.astype(str).str.strip() == "")
        if (wrong := structured | empty).any():
            row, what = wrong.argmax(), "not a single value" if structured.any() else "empty"
            raise InputError(f"--data {data}, row {row + 1}: the {option} (column {column!r}) is {what}; correct it")
    return pd.DataFrame({option: table[column].astype(str) for option, column in columns.items()})


def _read_csv(path: Path) -> pd.DataFrame:
    table = pd.read_csv(path, encoding="utf-8-sig", dtype=str, keep_default_na=False)
    if len(table) and not isinstance(table.index, pd.RangeIndex):  # pandas takes the first fields for an index
        raise ValueError("its lines have more fields than its header: put quotes around texts with commas")
    return table


def _split(table: pd.DataFrame, percents: Mapping[str, range] = PERCENTS) -> dict[str, pd.DataFrame]:
    """By a hash of the lower-cased words with single spaces; of texts that differ in less the first is kept."""
    return split(table, table["text"].str.lower().str.split().str.join(" ").drop_duplicates(), percents)
