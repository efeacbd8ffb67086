"""Examples in TRL's formats: texts, prompts with completions, or chats; and the default data."""

from __future__ import annotations

import ast
import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ivon_lora.cli.errors import InputError, input_errors
from ivon_lora.cli.examples import Examples, json_lines, split

#: the keys of a line say what it is
FORMATS = (("messages",), ("prompt", "completion"), ("text",))
PERCENTS = {"train": range(80), "test": range(80, 100)}
LENGTHS = range(20, 241)  # of a docstring's first paragraph, characters


def load_examples(data: str | None) -> Examples:
    """The default data, or those of a .jsonl or .txt; a fifth of them, chosen by a hash, is the test set.

    The default: what a function or class of networkx does, from its signature, in the words of its docstring; shifted:
    of sympy.geometry. Both come with torch, under the BSD licence.

    Raises:
        InputError: unreadable file, lines of different or unknown formats, or too few.
    """
    if data is None:
        shifted = _split([*_docstrings("sympy.geometry")], {"shifted": range(100)})
        return Examples("docstrings of networkx", {**_split([*_docstrings("networkx")]), **shifted})
    path = Path(data)
    if path.suffix.lower() not in (".jsonl", ".txt"):
        raise InputError(f"--data {data}: unknown kind of file; give a .jsonl, or a .txt of paragraphs")
    with input_errors(f"--data {data} cannot be read"):
        if path.suffix.lower() == ".jsonl":
            rows = [_row(found, f"--data {data}, line {number}") for number, found in json_lines(path)]
        else:
            parts = path.read_text(encoding="utf-8-sig").split("\n\n")
            rows = [{"text": part.strip()} for part in parts if part.strip()]
    if len({tuple(row) for row in rows}) > 1:
        raise InputError(f"--data {data}: lines of several formats; let all of them have the same keys")
    examples = Examples(f"--data {data}", _split(rows))
    if 0 in examples.counts().values():
        raise InputError(f"--data {data}: {len(rows)} examples are too few to train and to test; give some dozens")
    return examples


def _row(found: dict[str, Any], where: str) -> dict[str, Any]:
    for keys in FORMATS:
        if all(found.get(key) for key in keys):
            return {key: found[key] for key in keys}
    raise InputError(f'{where}: neither "messages", nor "prompt" and "completion", nor "text", but {sorted(found)}')


def _split(rows: list[dict[str, Any]], percents: Mapping[str, range] = PERCENTS) -> dict[str, pd.DataFrame]:
    """Different rows by a hash of the prompt, or of all that there is."""
    table, texts = pd.DataFrame(rows), pd.Series(map(json.dumps, rows), dtype=object)
    keys = table["prompt"].map(json.dumps) if "prompt" in table else texts
    return split(table, keys[texts.drop_duplicates().sort_values().index], percents, slice(-8, None))


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
