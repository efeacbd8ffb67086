"""Read labelled texts from the user's CSV or JSON-lines file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ivon_lora.finetune.corpus import Corpus, Row, build_corpus
from ivon_lora.finetune.errors import InputError
from ivon_lora.finetune.records import field, read_records

__all__ = ["load_table"]

MAX_LABELS = 1000


def load_table(path: Path, text: str = "text", label: str = "label") -> Corpus:
    """Labelled texts of a `.csv` (with a header line) or `.jsonl` file (one object a line), UTF-8.

    Args:
        path: the file.
        text: column with the text.
        label: column with the class; its values are read as strings and numbered in sorted order.

    Raises:
        InputError: unreadable file, missing column, empty text or label, fewer than two classes, too few texts.
    """
    pairs = [
        (field(path, line, record, "text", text), field(path, line, record, "label", label))
        for line, record in read_records(path)
    ]
    if not pairs:
        raise InputError(f"--data {path}: the file has no rows; give one with texts and labels")
    counts = Counter(name for _, name in pairs)
    _check_labels(path, label, counts, len(pairs))
    labels = tuple(sorted(counts, key=_label_order))
    number = {name: index for index, name in enumerate(labels)}
    return build_corpus(f"--data {path}", (Row(words, number[name]) for words, name in pairs), labels)


def _check_labels(path: Path, label: str, counts: Counter[str], rows: int) -> None:
    if len(counts) < 2:
        raise InputError(
            f"--data {path}: one class only ({next(iter(counts))!r} in column {label!r}); give two or more"
        )
    if len(counts) > MAX_LABELS or (rows > 20 and len(counts) > rows / 2):
        raise InputError(
            f"--data {path}: column {label!r} has {len(counts)} different values in {rows} rows, too many for classes; "
            "set --label to the column with the class"
        )


def _label_order(name: str) -> tuple[int, float, str]:
    try:
        return 0, float(name), name
    except ValueError:
        return 1, 0.0, name
