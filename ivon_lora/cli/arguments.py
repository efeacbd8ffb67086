"""Options that several verbs have in common, and options that are the fields of a dataclass."""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import Field, field, fields
from pathlib import Path
from typing import Any

__all__ = ["add_folder", "add_json", "add_options", "add_verb", "at_least", "option", "positive", "print_json"]


def add_verb(
    verbs: Any, name: str, run: Callable[[argparse.Namespace], int], *, summary: str, description: str, examples: str
) -> argparse.ArgumentParser:
    """A verb of the command line; its own arguments are added to what is returned.

    Args:
        verbs: what ``add_subparsers()`` returned (argparse has no public type for it).
        name: of the verb.
        run: called with the arguments; returns the exit status.
        summary: one line for ``ivon-lora --help``.
        description: a paragraph for the verb's own help, wrapped here.
        examples: the lines below "examples:", printed as they are.
    """
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=summary,
        description=textwrap.fill(description, min(shutil.get_terminal_size().columns, 100) - 2),
        epilog="examples:\n" + textwrap.indent(examples, "  "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_folder(parser: argparse.ArgumentParser) -> None:
    """The folder that a verb works on, and the files that belong to it if they lie elsewhere."""
    add = parser.add_argument
    add("folder", type=Path, help="the --out of a run, or an adapter directory (also a checkpoint of the Trainer)")
    add("--posterior", type=Path, metavar="FILE", help="written by save_posterior (default: in the folder)")
    add("--optimizer", type=Path, metavar="FILE", help="saved state_dict() of an IVON (default: in the folder)")


def add_json(parser: Any, what: str = "JSON instead of text") -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help=f"print {what}")


def print_json(value: Any) -> None:
    """JSON for programs: strict, indented, one value."""
    print(json.dumps(value, indent=2, allow_nan=False))


def option(default: Any, text: str, kind: Any = str, group: str = "", metavar: str | None = None) -> Any:
    """A dataclass field that is an option of the command line.

    Args:
        default: its value unless it is given; None if that depends on other options, and ``text`` says how.
        text: help.
        kind: a tuple of allowed words, or what turns a word into the value, as ``type`` of argparse.
        group: heading in the help; the options after it belong to it, too.
        metavar: name of the value in the help.
    """
    return field(default=default, metadata={"text": text, "kind": kind, "group": group, "metavar": metavar})


def add_options(parser: argparse.ArgumentParser, settings: type, names: Iterable[str] | None = None) -> None:
    """Add the fields of a dataclass made with :func:`option`; only what is given will be in the namespace.

    Args:
        parser: of a verb.
        settings: the dataclass.
        names: of the fields; None: all, under the headings of their groups.
    """
    chosen: dict[str, Field[Any]] = {one.name: one for one in fields(settings)}
    target: Any = parser
    for name in chosen if names is None else names:
        about = chosen[name].metadata
        if names is None and about["group"]:
            target = parser.add_argument_group(about["group"])
        default = chosen[name].default
        words = {"choices": about["kind"]} if isinstance(about["kind"], tuple) else {"type": about["kind"]}
        target.add_argument(
            "--" + name.replace("_", "-"),
            default=argparse.SUPPRESS,
            help=about["text"] + ("" if default is None else f" (default: {_short(default)})"),
            metavar=about["metavar"],
            **words,
        )


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def at_least(bound: int) -> Callable[[str], int]:
    """The type of an option that is an integer of at least ``bound``."""

    def integer(text: str) -> int:
        value = int(text)
        if value < bound:
            raise argparse.ArgumentTypeError(f"{value} is too small: give {bound} or more")
        return value

    return integer


def positive(text: str) -> float:
    """The type of an option that is a positive, finite number."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be a positive number")
    return value
