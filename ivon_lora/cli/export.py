"""The verb `export`: a plain LoRA adapter in the layout that a server wants."""

from __future__ import annotations

import argparse
import logging
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ivon_lora import export_saved
from ivon_lora.cli.arguments import add_folder, add_json, add_verb, print_json
from ivon_lora.cli.errors import InputError, input_errors
from ivon_lora.cli.saved_run import read_run

__all__ = ["register_export"]

LAYOUTS = ("uniform", "compact")
EXAMPLES = """\
ivon-lora export runs/finetune --layout compact          smallest files, into runs/finetune/adapter-compact
ivon-lora export my-adalora --out my-lora                AdaLoRA, rsLoRA or DoRA from PEFT to a plain adapter
ivon-lora export checkpoint-500 --out my-lora            with the means and rank masks of its optimizer.pt
ivon-lora export my-adapter --posterior my.safetensors --out my-lora --json
"""


def register_export(verbs: Any) -> None:
    """Add the verb `export`."""
    parser = add_verb(
        verbs,
        "export",
        _run,
        summary="write a plain LoRA adapter that PEFT, vLLM, llama.cpp and diffusers load",
        description="Write a saved LoRA or AdaLoRA adapter as a plain one: pruned ranks dropped, scale folded in. The "
        "files are compared with the source before they take their place. No base model is needed.",
        examples=EXAMPLES,
    )
    add_folder(parser)
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        default=LAYOUTS[0],
        help="uniform: one rank for all layers, right for every consumer; compact: smallest, not for llama.cpp "
        "(default: uniform)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: beside it, named by layout)")
    parser.add_argument("--overwrite", action="store_true", help="replace the adapter in --out")
    add_json(parser)


def _run(arguments: argparse.Namespace) -> int:
    run = read_run(arguments.folder, arguments.posterior, arguments.optimizer)
    source = run.adapter_folder.resolve()
    out = arguments.out or source.with_name(f"{source.name}-{arguments.layout}")
    if out.resolve() == source:
        raise InputError(f"--out {out} is the adapter itself: give another folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not arguments.overwrite:
        raise InputError(f"--out {out} exists: give another folder, or --overwrite to replace the adapter in it")
    # the adapter of a run has lost its pruned ranks already, and its posterior has not
    asked_for = arguments.posterior is not None or arguments.optimizer is not None
    posterior = run.posterior if asked_for or run.report is None else None
    try:
        with input_errors(source), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say is in the report's notes
            logging.getLogger("ivon_lora.export").setLevel(logging.WARNING)
            report = export_saved(source, out, arguments.layout, posterior)
    except InputError as error:
        if isinstance(error.__cause__, OSError):  # not the input, but a disk that is full
            raise error.__cause__ from None
        raise
    print_json(asdict(report) | {"path": str(report.path)}) if arguments.json else print(report)
    return 0
