"""Options that several verbs have in common, and options that are the fields of a dataclass."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any


def add_folder(parser: argparse.ArgumentParser) -> None:
    """The folder that a verb works on, and the files that belong to it if they lie elsewhere."""
    add = parser.add_argument
    add("folder", type=Path, help="the --out of a run, or an adapter directory (also a checkpoint of the Trainer)")
    add("--posterior", type=Path, metavar="FILE", help="written by save_posterior (default: in the folder)")
    add("--optimizer", type=Path, metavar="FILE", help="saved state_dict() of an IVON (default: in the folder)")


def setting(default: Any, text: str, kind: Any = str, metavar: str | None = None, group: str = "") -> Any:
    """A dataclass field that is an option: its default (None: ``text`` says), its help and its type or allowed words.

    ``group`` is a heading in the help, for this option and those after it.
    """
    return field(default=default, metadata={"text": text, "kind": kind, "metavar": metavar, "group": group})


def add_options(parser: argparse.ArgumentParser, settings: type, names: Iterable[str] = ()) -> None:
    """Add the fields of a dataclass made of `setting`, or those of some names."""
    target: Any = parser
    for one in fields(settings):
        if names and one.name not in names:
            continue
        if one.metadata["group"] and not names:
            target = parser.add_argument_group(one.metadata["group"])
        kind, default = one.metadata["kind"], one.default
        shown = f" (default: {f'{default:g}' if isinstance(default, float) else default})"
        target.add_argument(
            "--" + one.name.replace("_", "-"),
            default=argparse.SUPPRESS,
            help=one.metadata["text"] + ("" if default in (None, ()) else shown),
            metavar=one.metadata["metavar"],
            **({"choices": kind} if isinstance(kind, tuple) else {"type": kind}),
            **({"action": "append"} if default == () else {}),
        )


def chosen(arguments: argparse.Namespace, settings: type) -> dict[str, Any]:
    """The options of `add_options` that were given, by the names of the fields."""
    names = {one.name for one in fields(settings)}
    return {name: value for name, value in vars(arguments).items() if name in names}


def bounded(kind: Callable[[str], Any], fits: Callable[[Any], bool], cure: str) -> Callable[[str], Any]:
    """The type of an option whose values have to fit; ``cure`` ends the message for one that does not."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text} {cure}")
        return value

    parse.__name__ = getattr(kind, "__name__", "value")
    return parse


def at_least(bound: int) -> Callable[[str], int]:
    """The type of an option that is an integer of at least ``bound``."""
    return bounded(int, lambda value: value >= bound, f"is too small: give {bound} or more")


positive = bounded(float, lambda value: 0 < value < float("inf"), "must be a positive number")
not_negative = bounded(float, lambda value: 0 <= value < float("inf"), "must be 0 or a positive number")
below_one = bounded(float, lambda value: 0 <= value < 1, "is outside [0, 1): give for example 0.99999")
share_or_steps = bounded(
    lambda text: int(text) if text.isdecimal() else float(text),
    lambda value: value >= 0 and (isinstance(value, int) or value <= 1),
    "must be a number of steps (20) or a share of them (0.1)",
)


def as_steps(value: int | float, steps: int) -> int:
    """Steps for an int; for a float, that share of ``steps``, rounded."""
    return value if isinstance(value, int) else round(value * steps)


@dataclass(frozen=True)
class RunSettings:
    """The options that every training run has."""

    samples: int = setting(8, "posterior samples to average", at_least(1), "N")
    seed: int = setting(0, "of everything random", at_least(0))
    device: str = setting("auto", "where to compute", ("auto", "cpu", "cuda"))
    threads: int | None = setting(None, "of torch on the CPU (default: torch's choice)", at_least(1), "N")
