"""Texts without labels, for what needs none."""

from __future__ import annotations

from pathlib import Path

from ivon_lora.finetune.corpus import TRAIN_BELOW, Row, rows_by_digest
from ivon_lora.finetune.errors import InputError
from ivon_lora.finetune.records import field, read_records
from ivon_lora.finetune.reviews import load_reviews

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
    records = read_records(path)
    rows = rows_by_digest(Row(field(path, line, record, "text", column), 0) for line, record in records)
    texts = [row.text for digest, row in rows if int(digest[:8], 16) % 100 < TRAIN_BELOW]
    if not texts:
        raise InputError(
            f"--data {path}: {len(rows)} different texts are too few to train on; give at least some dozens"
        )
    return texts
