"""Examples in TRL's formats: texts, prompts with completions, or chats; and the default data."""

from __future__ import annotations

import ast
import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ivon_lora.cli.dataset import PERCENTS, Examples, json_lines, split
from ivon_lora.cli.errors import InputError, input_errors

TEXT, CHAT = "text", 'a chat (messages, each with its "role")'
#: the keys of a line say what it is, and what their values may be: all the same
FORMATS = {("messages",): (CHAT,), ("prompt", "completion"): (TEXT, CHAT), ("text",): (TEXT,)}
LENGTHS = range(20, 241)  # of a docstring's first paragraph, characters


def load_examples(data: str | None, validation: str | None = None) -> Examples:
    """The default data, or those of a .jsonl or .txt; a hash chooses a tenth to validate and a fifth to test.

    With a file for ``validation``, that tenth is for training. Nothing is validated where no example is left for it.
    The default: what a function or class of networkx does, from its signature, in the words of its docstring; shifted:
    of sympy.geometry. Both come with torch, under the BSD licence.

    Raises:
        InputError: unreadable file, lines of different or unknown formats, or too few.
    """
    own = [] if validation is None else _read(f"--validation {validation}", Path(validation))
    if data is None:
        source, rows = "docstrings of networkx", [*_docstrings("networkx")]
        shifted = _split([*_docstrings("sympy.geometry")], {"shifted": range(100)})
    else:
        source, shifted = f"--data {data}", {}
        rows = _read(source, Path(data))
    if len(formats := {tuple(row) for row in [*rows, *own]}) > 1:
        both = " and ".join(sorted(map("+".join, formats)))
        raise InputError(f"{source}: lines of several formats, {both}; let all of them have the same keys")
    splits = {**_split(rows), **shifted}
    if validation is not None:
        splits["train"] = pd.concat([splits["train"], splits["validation"]])
        splits |= _split(own, {"validation": range(100)})
    if not len(splits["train"]) or not len(splits["test"]):
        different = len(set(map(json.dumps, rows)))
        raise InputError(f"{source}: {different} different examples are too few to train and to test; give some dozens")
    return Examples(source, {name: table for name, table in splits.items() if len(table)})


def _read(source: str, path: Path) -> list[dict[str, Any]]:
    if path.suffix.lower() not in (".jsonl", ".txt"):
        raise InputError(f"{source}: unknown kind of file; give a .jsonl, or a .txt of paragraphs")
    with input_errors(f"{source} cannot be read"):
        if path.suffix.lower() == ".jsonl":
            rows = [_row(found, f"{source}, line {number}") for number, found in json_lines(path, source)]
        else:
            parts = path.read_text(encoding="utf-8-sig").split("\n\n")
            rows = [{"text": part.strip()} for part in parts if part.strip()]
        if not rows:
            raise InputError(f"{source}: no example in it; give some dozens")
    return rows


def _row(found: dict[str, Any], where: str) -> dict[str, Any]:
    for keys, allowed in FORMATS.items():
        if not all(found.get(key) for key in keys):
            continue
        kinds = [_kind(found[key]) for key in keys]
        if kinds[0] not in allowed or len(set(kinds)) > 1:
            names = " and ".join(f'"{key}"' for key in keys)
            raise InputError(f"{where}: {names} must be {' or '.join(allowed)}, got {' and '.join(kinds)}")
        row, tools = {key: found[key] for key in keys}, found.get("tools") or None
        if kinds[0] == CHAT:  # as a string, for every line has tools of its own
            row["tools"] = json.dumps(tools) if isinstance(tools, list) else tools
        return row
    raise InputError(f'{where}: neither "messages", nor "prompt" and "completion", nor "text", but {sorted(found)}')


def _kind(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(message, dict) and "role" in message for message in value):
        return CHAT
    return TEXT if isinstance(value, str) else type(value).__name__


def _split(rows: list[dict[str, Any]], percents: Mapping[str, range] = PERCENTS) -> dict[str, pd.DataFrame]:
    """Different rows by a hash of the prompt, or of all that there is."""
    table, texts = pd.DataFrame(rows, dtype=object), pd.Series(map(json.dumps, rows), dtype=object)
    keys = table["prompt"].map(json.dumps) if "prompt" in table else texts
    return split(table, keys[texts.drop_duplicates().sort_values().index], percents)


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
