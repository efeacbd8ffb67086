"""Options that several verbs have in common."""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["add_folder", "add_json", "add_verb", "print_json"]


def add_verb(
    verbs: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    summary: str,
    description: str,
    examples: str,
    **options: Any,
) -> argparse.ArgumentParser:
    """A verb of the command line; its own arguments are added to what is returned.

    Args:
        verbs: what ``add_subparsers()`` returned (argparse has no public type for it).
        name: of the verb.
        run: called with the arguments; returns the exit status.
        summary: one line for ``ivon-lora --help``.
        description: a paragraph for the verb's own help, wrapped here.
        examples: the lines below "examples:", printed as they are.
        options: further arguments of `argparse.ArgumentParser`.
    """
    width = min(shutil.get_terminal_size().columns, 100) - 2
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=summary,
        description=textwrap.fill(description, width),
        epilog="examples:\n" + textwrap.indent(examples, "  "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )
    parser.set_defaults(run=run)
    return parser


def add_folder(parser: argparse.ArgumentParser) -> None:
    """The folder that a verb works on, and the files that belong to it if they lie elsewhere."""
    parser.add_argument(
        "folder", type=Path, help="the --out of a run, or an adapter directory (also a checkpoint of the Trainer)"
    )
    parser.add_argument(
        "--posterior", type=Path, metavar="FILE", help="written by save_posterior (default: in the folder)"
    )
    parser.add_argument(
        "--optimizer", type=Path, metavar="FILE", help="saved state_dict() of an IVON (default: in the folder)"
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def print_json(value: Any) -> None:
    """JSON for programs: strict, indented, one value."""
    print(json.dumps(value, indent=2, allow_nan=False))
