"""The command line. Errors are one line on stderr; the exit status is 2 for input that cannot be used.

A verb is a module: its docstring is its help, ``add_arguments(parser)``, if it has options, adds them, and
``run(arguments)`` does it and returns what it found, as plain JSON values and as text.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import ivon_lora.cli.env as env
import ivon_lora.cli.export as export
import ivon_lora.cli.finetune as finetune
import ivon_lora.cli.inspect as inspect
import ivon_lora.cli.plot as plot
import ivon_lora.cli.ranks as ranks
import ivon_lora.cli.sft as sft
from ivon_lora import __version__
from ivon_lora.cli.errors import InputError, TrainingError

__all__ = ["main"]

VERBS = (finetune, sft, ranks, inspect, export, plot, env)
EXIT_FAILED, EXIT_INPUT, EXIT_INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ivon-lora` with ``argv`` (default: the process's arguments).

    Returns:
        exit status: 0, 1 if training or writing failed, 2 for unusable input, 130 after Ctrl-C.
    """
    try:
        arguments = _parser().parse_args(argv)
        with contextlib.redirect_stdout(sys.stderr if arguments.json else sys.stdout):  # what is said on the way
            found, text = arguments.run(arguments)
        print(json.dumps(found, indent=2, allow_nan=False) if arguments.json else text)
        sys.stdout.flush()  # here, where a reader that has gone can still be noticed
        return 0
    except InputError as error:
        return _fail(str(error), EXIT_INPUT)
    except ModuleNotFoundError as error:
        name = error.name or getattr(error.__cause__, "name", None)  # transformers puts its own around it
        return _fail(f"{name} is missing: pip install 'ivon-lora[demo]'", EXIT_INPUT)
    except BrokenPipeError:  # the reader of the output, such as `head`, has gone; that is no failure of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except TrainingError as error:
        return _fail(str(error), EXIT_FAILED)
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        return _fail(f"{where}{error.strerror or error}", EXIT_FAILED)
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "ivon-lora: interrupted; nothing was written", file=sys.stderr)
        return EXIT_INTERRUPTED


def _fail(message: str, status: int) -> int:
    print(f"ivon-lora: error: {message}", file=sys.stderr)
    return status


class _Parser(argparse.ArgumentParser):
    """argparse with errors in one line, raised as `InputError`."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see `{self.prog} --help`)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ivon-lora",
        description="LoRA fine-tuning with a posterior and rank pruning inside the optimizer step.",
        epilog="`ivon-lora VERB --help` shows the options and examples of a verb.",
    )
    parser.add_argument("--version", action="version", version=f"ivon-lora {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for verb in VERBS:
        text, kind = str(verb.__doc__), argparse.RawDescriptionHelpFormatter
        name = verb.__name__.rpartition(".")[2]
        one = verbs.add_parser(name, help=text.splitlines()[0], description=text, formatter_class=kind)
        one.set_defaults(run=verb.run)
        one.add_argument("--json", action="store_true", help="print JSON instead of text")
        if hasattr(verb, "add_arguments"):
            verb.add_arguments(one)
    return parser
