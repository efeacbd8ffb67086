"""Records of the user's CSV or JSON-lines file, and their fields; what is wrong with them in one line."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from ivon_lora.finetune.errors import InputError, one_line

__all__ = ["field", "read_records"]

Record = dict[str, object]


def read_records(path: Path) -> Iterator[tuple[int, Record]]:
    """Line numbers and records of a `.csv` (with a header line) or `.jsonl` file (one object a line), UTF-8.

    Raises:
        InputError: unknown kind of file, or one that cannot be read.
    """
    readers = {".csv": _read_csv, ".jsonl": _read_jsonl}
    if path.suffix.lower() not in readers:
        raise InputError(f"--data {path}: unknown kind of file; give a .csv with a header line or a .jsonl")
    try:
        yield from readers[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise InputError(f"--data {path}: not UTF-8 ({error.reason} at byte {error.start}); convert the file") from None
    except OSError as error:
        raise InputError(f"--data {path}: cannot be read ({error.strerror}); give a file that exists") from None
    except csv.Error as error:
        raise InputError(f"--data {path}: not a CSV file ({one_line(error)}); check its quotes") from None


def field(path: Path, line: int, record: Record, option: str, column: str) -> str:
    """The value in ``column``, which the user names with ``--option``: "text" or "label".

    Raises:
        InputError: there is no such column, or it is empty or not a single value.
    """
    if column not in record:
        columns = ", ".join(repr(name) for name in record if name != "None")
        raise InputError(f"--data {path}, line {line}: no column {column!r}; it has {columns}: set --{option}")
    value = record[column]
    if value is None or isinstance(value, (dict, list)) or not str(value).strip():
        what = "empty" if value is None or value == [] or not str(value).strip() else "not a single value"
        raise InputError(f"--data {path}, line {line}: the {option} (column {column!r}) is {what}; correct the line")
    return str(value) if option == "text" else str(value).strip()


def _read_csv(path: Path) -> Iterator[tuple[int, Record]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        for record in reader:
            yield reader.line_num, {str(key): value for key, value in record.items()}


def _read_jsonl(path: Path) -> Iterator[tuple[int, Record]]:
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
