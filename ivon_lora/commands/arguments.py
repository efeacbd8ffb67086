"""Options that several verbs have in common."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

__all__ = ["add_folder", "add_json", "print_json"]


def add_folder(parser: argparse.ArgumentParser) -> None:
    """The folder that a verb works on, and the files that belong to it if they lie elsewhere."""
    parser.add_argument(
        "folder", type=Path, help="the --out of a run, or an adapter directory (also a checkpoint of the Trainer)"
    )
    parser.add_argument("--posterior", type=Path, metavar="FILE", help="of save_posterior (default: in the folder)")
    parser.add_argument(
        "--optimizer", type=Path, metavar="FILE", help="saved state_dict() of an IVON (default: in the folder)"
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def print_json(value: Any) -> None:
    """JSON for programs: strict, indented, one value."""
    print(json.dumps(value, indent=2, allow_nan=False))
