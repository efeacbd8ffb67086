"""Read labelled texts from the user's CSV or JSON-lines file."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from .corpus import Corpus, Row, build_corpus
from .errors import InputError, one_line

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
    readers = {".csv": _read_csv, ".jsonl": _read_jsonl}
    if path.suffix.lower() not in readers:
        raise InputError(f"--data {path}: unknown kind of file; give a .csv with a header line or a .jsonl")
    pairs: list[tuple[str, str]] = []
    try:
        for line, record in readers[path.suffix.lower()](path):
            pairs.append((_field(path, line, record, "text", text), _field(path, line, record, "label", label)))
    except UnicodeDecodeError as error:
        raise InputError(f"--data {path}: not UTF-8 ({error.reason} at byte {error.start}); convert the file") from None
    except OSError as error:
        raise InputError(f"--data {path}: cannot be read ({error.strerror}); give a file that exists") from None
    except csv.Error as error:
        raise InputError(f"--data {path}: not a CSV file ({one_line(error)}); check its quotes") from None
    if not pairs:
        raise InputError(f"--data {path}: the file has no rows; give one with texts and labels")
    counts = Counter(name for _, name in pairs)
    _check_labels(path, label, counts, len(pairs))
    labels = tuple(sorted(counts, key=_label_order))
    number = {name: index for index, name in enumerate(labels)}
    return build_corpus(f"--data {path}", (Row(words, number[name]) for words, name in pairs), labels)


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        for record in reader:
            yield reader.line_num, {str(key): value for key, value in record.items()}


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"--data {path}, line {number}: not JSON ({error.msg}); correct the line") from None
            if not isinstance(record, dict):
                raise InputError(f"--data {path}, line {number}: not a JSON object; write one object a line")
            yield number, record


def _field(path: Path, line: int, record: dict[str, object], option: str, column: str) -> str:
    if column not in record:
        columns = ", ".join(repr(name) for name in record if name != "None")
        raise InputError(f"--data {path}, line {line}: no column {column!r}; it has {columns}: set --{option}")
    value = record[column]
    if value is None or isinstance(value, (dict, list)) or not str(value).strip():
        what = "empty" if value is None or value == [] or not str(value).strip() else "not a single value"
        raise InputError(f"--data {path}, line {line}: the {option} (column {column!r}) is {what}; correct the line")
    return str(value) if option == "text" else str(value).strip()


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
