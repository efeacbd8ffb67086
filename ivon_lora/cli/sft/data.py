"""Examples in TRL's formats: texts, prompts with completions, or chats; and the default data."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ivon_lora.cli.errors import InputError, input_errors

#: the keys of a line say what it is
FORMATS = (("messages",), ("prompt", "completion"), ("text",))
TRAIN_BELOW = 80  # percent, of a hash of the example
LENGTHS = range(20, 241)  # of a docstring's first paragraph, characters


@dataclass(frozen=True)
class Examples:
    """Rows of TRL's data sets.

    Attributes:
        source: where they come from, for people.
        splits: "train", "test" and, for the default data, "shifted", in the order of a hash: any part from the
            beginning is a random one.
    """

    source: str
    splits: dict[str, list[dict[str, Any]]]
    labels: tuple[str, ...] = ()  # no classes

    def counts(self) -> dict[str, int]:
        """Number of examples in each split."""
        return {name: len(rows) for name, rows in self.splits.items()}

    def fingerprint(self) -> str:
        """sha256 of all examples: equal for equal data."""
        return hashlib.sha256(json.dumps(self.splits).encode()).hexdigest()


def load_examples(data: str | None) -> Examples:
    """The default data, or those of a .jsonl or .txt; a fifth of them, chosen by a hash, is the test set.

    The default: what a function or class of networkx does, from its signature, in the words of its docstring; shifted:
    of sympy.geometry. Both come with torch, under the BSD licence.

    Raises:
        InputError: unreadable file, lines of different or unknown formats, or too few.
    """
    if data is None:
        shifted = [row for _, row in _by_hash(_docstrings("sympy.geometry"))]
        return Examples("docstrings of networkx", {**_split(_docstrings("networkx")), "shifted": shifted})
    path = Path(data)
    if path.suffix.lower() not in (".jsonl", ".txt"):
        raise InputError(f"--data {data}: unknown kind of file; give a .jsonl, or a .txt of paragraphs")
    with input_errors(f"--data {data} cannot be read"):
        content = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() == ".txt":
        rows = [{"text": part.strip()} for part in content.split("\n\n") if part.strip()]
    else:
        lines = [(number, line) for number, line in enumerate(content.splitlines(), 1) if line.strip()]
        rows = [_row(line, f"--data {data}, line {number}") for number, line in lines]
    if len({tuple(row) for row in rows}) > 1:
        raise InputError(f"--data {data}: lines of several formats; let all of them have the same keys")
    splits = _split(rows)
    if not all(splits.values()):
        raise InputError(f"--data {data}: {len(rows)} examples are too few to train and to test; give some dozens")
    return Examples(f"--data {data}", splits)


def _row(line: str, where: str) -> dict[str, Any]:
    with input_errors(f"{where}: not a JSON object"):
        found = dict(json.loads(line))
    for keys in FORMATS:
        if all(found.get(key) for key in keys):
            return {key: found[key] for key in keys}
    raise InputError(f'{where}: neither "messages", nor "prompt" and "completion", nor "text", but {sorted(found)}')


def _by_hash(rows: Iterable[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Different rows in the order of a hash, sha256 of the prompt or of all that there is, with it."""
    different = {json.dumps(row): row for row in rows}
    keys = {text: json.dumps(row.get("prompt", row)) for text, row in different.items()}
    digests = {text: hashlib.sha256(key.encode()).hexdigest() for text, key in keys.items()}
    return [(digests[text], different[text]) for text in sorted(different, key=lambda text: (digests[text], text))]


def _split(rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for digest, row in _by_hash(rows):
        splits["train" if int(digest[-8:], 16) % 100 < TRAIN_BELOW else "test"].append(row)
    return splits


def _docstrings(package: str) -> Iterator[dict[str, Any]]:
    """Prompts that are signatures, completions that are the first paragraphs of docstrings; nothing is imported."""
    top, *below = package.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or spec.origin is None:
        raise InputError(
            f"the default data are docstrings of {top}, which is missing: pip install {top}, or give --data"
        )
    for path in sorted(Path(spec.origin).parent.joinpath(*below).rglob("*.py")):
        if "tests" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            words = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            if len(words) in LENGTHS and not any(mark in words for mark in (">>>", ".. ")):
                signature = f"({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef) else ""
                head = f"{'def' if signature else 'class'} {node.name}{signature}"
                yield {"prompt": f"{head}:\n", "completion": words}
