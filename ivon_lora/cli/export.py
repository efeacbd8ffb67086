"""The verb `export`: a plain LoRA adapter in the layout that a server wants."""

from __future__ import annotations

import argparse
import logging
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ivon_lora.cli.arguments import add_folder, add_json, add_verb, print_json
from ivon_lora.cli.saved_run import SavedRun, read_run
from ivon_lora.export.adapter import ExportReport, export_saved
from ivon_lora.export.layout import LAYOUTS
from ivon_lora.finetune.errors import InputError, one_line
from ivon_lora.posterior.posterior import PosteriorFile

__all__ = ["register_export"]

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
        default=LAYOUTS[0],
        help="uniform: one rank for all layers, right for every consumer; compact: smallest, not for llama.cpp "
        f"(default: {LAYOUTS[0]})",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: beside it, named by layout)")
    parser.add_argument("--overwrite", action="store_true", help="replace the adapter in --out")
    add_json(parser)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.layout not in LAYOUTS:
        raise InputError(f"--layout {arguments.layout!r} is unknown: choose {', '.join(LAYOUTS)}")
    run = read_run(arguments.folder, arguments.posterior, arguments.optimizer)
    out = arguments.out or _beside(run, arguments.layout)
    if out.resolve() == run.adapter_folder.resolve():
        raise InputError(f"--out {out} is the adapter itself: give another folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not arguments.overwrite:
        raise InputError(f"--out {out} exists: give another folder, or --overwrite to replace the adapter in it")
    report = _export(run, out, arguments.layout, _matching(run, arguments))
    print_json(asdict(report) | {"path": str(report.path)}) if arguments.json else print(report)
    return 0


def _export(run: SavedRun, out: Path, layout: str, posterior: PosteriorFile | None) -> ExportReport:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say is in the report's notes
            logging.getLogger("ivon_lora.export.adapter").setLevel(logging.WARNING)
            return export_saved(run.adapter_folder, out, layout, posterior)
    except (ValueError, ImportError) as error:
        raise InputError(one_line(error, 400)) from error


def _matching(run: SavedRun, arguments: argparse.Namespace) -> PosteriorFile | None:
    """The posterior, unless it is that of a run, whose adapter has lost its pruned ranks already."""
    asked_for = arguments.posterior is not None or arguments.optimizer is not None
    return run.posterior if asked_for or run.report is None else None


def _beside(run: SavedRun, layout: str) -> Path:
    folder = run.adapter_folder.resolve()
    return folder.with_name(f"{folder.name}-{layout}")
