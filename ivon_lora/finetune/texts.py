"""Texts without labels, for what needs none."""

from __future__ import annotations

import csv
from pathlib import Path

from .corpus import TRAIN_BELOW, Row, rows_by_digest
from .errors import InputError, one_line
from .reviews import load_reviews
from .tables import _field, _read_csv, _read_jsonl

__all__ = ["training_texts"]


def training_texts(data: str | None, column: str) -> list[str]:
    """The texts that `finetune` would train on, without duplicates, in an order in which any prefix is a random subset.

    Args:
        data: .csv with a header line or .jsonl, UTF-8; None for the film reviews. No column of labels is needed.
        column: column with the text.

    Raises:
        InputError: unreadable file, missing column, empty text, no text.
    """
    if data is None:
        return [row.text for row in load_reviews().train]
    path = Path(data)
    readers = {".csv": _read_csv, ".jsonl": _read_jsonl}
    if path.suffix.lower() not in readers:
        raise InputError(f"--data {path}: unknown kind of file; give a .csv with a header line or a .jsonl")
    try:
        records = list(readers[path.suffix.lower()](path))
    except UnicodeDecodeError as error:
        raise InputError(f"--data {path}: not UTF-8 ({error.reason} at byte {error.start}); convert the file") from None
    except OSError as error:
        raise InputError(f"--data {path}: cannot be read ({error.strerror}); give a file that exists") from None
    except csv.Error as error:
        raise InputError(f"--data {path}: not a CSV file ({one_line(error)}); check its quotes") from None
    rows = rows_by_digest(Row(_field(path, line, record, "text", column), 0) for line, record in records)
    texts = [row.text for digest, row in rows if int(digest[:8], 16) % 100 < TRAIN_BELOW]
    if not texts:
        raise InputError(
            f"--data {path}: {len(rows)} different texts are too few to train on; give at least some dozens"
        )
    return texts
