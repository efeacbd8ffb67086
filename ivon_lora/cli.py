"""The command line. Errors are one line on stderr; the exit status is 2 for input that cannot be used."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from ivon_lora.commands.arguments import add_json, print_json
from ivon_lora.commands.export import register_export
from ivon_lora.commands.inspect import register_inspect
from ivon_lora.commands.plot import register_plot
from ivon_lora.finetune.command import register_finetune
from ivon_lora.finetune.errors import InputError, TrainingError
from ivon_lora.finetune.ranks_command import register_ranks

__all__ = ["main"]

EXIT_FAILED = 1
EXIT_INPUT = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ivon-lora` with ``argv`` (default: the process's arguments).

    Returns:
        exit status: 0, 1 if training or writing failed, 2 for unusable input, 130 after Ctrl-C.
    """
    try:
        arguments = _parser().parse_args(argv)
        status = int(arguments.run(arguments))
        sys.stdout.flush()  # here, where a reader that has gone can still be noticed
        return status
    except InputError as error:
        print(f"ivon-lora: error: {error}", file=sys.stderr)
        return EXIT_INPUT
    except BrokenPipeError:  # the reader of the output, such as `head`, has gone; that is no failure of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (TrainingError, OSError) as error:
        print(f"ivon-lora: error: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("ivon-lora: interrupted; nothing was written", file=sys.stderr)
        return EXIT_INTERRUPTED


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
    verbs = parser.add_subparsers(title="verbs", dest="verb", metavar="VERB", required=True)
    register_finetune(verbs)
    register_ranks(verbs)
    register_inspect(verbs)
    register_export(verbs)
    register_plot(verbs)
    _register_env(verbs)
    return parser


def _register_env(verbs: Any) -> None:
    parser = verbs.add_parser(
        "env",
        help="show versions and what this machine can do",
        description="For bug reports.",
        epilog="examples:\n  ivon-lora env --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_json(parser)
    parser.set_defaults(run=_run_env)


def _run_env(arguments: argparse.Namespace) -> int:
    from ivon_lora.finetune.report import read_versions
    from ivon_lora.finetune.runtime import Runtime

    facts = {**read_versions(), **Runtime("auto", "auto", None).as_dict()}
    if arguments.json:
        print_json(facts)
        return 0
    for name, value in facts.items():
        print(f"{name:<14}{'not installed' if value is None else value}")
    return 0
