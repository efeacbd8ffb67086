"""The verb `env`: versions, and what the machine can do."""

from __future__ import annotations

import argparse
from typing import Any

from ivon_lora.cli.arguments import add_json, add_verb, print_json

__all__ = ["register_env"]


def register_env(verbs: Any) -> None:
    """Add the verb `env`."""
    parser = add_verb(
        verbs,
        "env",
        _run,
        summary="show versions and what this machine can do",
        description="Versions of the libraries, and device, precision and threads that the other verbs would choose "
        "here. For bug reports.",
        examples="ivon-lora env --json",
    )
    add_json(parser)


def _run(arguments: argparse.Namespace) -> int:
    from ivon_lora.finetune.report import read_versions
    from ivon_lora.finetune.runtime import Runtime

    facts = {**read_versions(), **Runtime("auto", "auto", None).as_dict()}
    if arguments.json:
        print_json(facts)
        return 0
    for name, value in facts.items():
        print(f"{name:<14}{'not installed' if value is None else value}")
    return 0
