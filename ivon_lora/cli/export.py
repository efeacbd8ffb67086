"""Write a plain LoRA adapter that PEFT, vLLM, llama.cpp and diffusers load.

A saved LoRA or AdaLoRA adapter becomes a plain one: pruned ranks dropped, scale folded in. The files are compared with
the source before they take their place. No base model is needed.

examples:
  ivon-lora export runs/finetune --layout compact          smallest files, into runs/finetune/adapter-compact
  ivon-lora export my-adalora --out my-lora                AdaLoRA, rsLoRA or DoRA from PEFT to a plain adapter
  ivon-lora export checkpoint-500 --out my-lora            with the means and rank masks of its optimizer.pt
  ivon-lora export my-adapter --posterior my.safetensors --out my-lora --json
  ivon-lora export checkpoint-500 --samples 8 --out ensemble   sample-0 ... sample-7, for a server of several adapters
"""

from __future__ import annotations

import argparse
import logging
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ivon_lora import export_saved
from ivon_lora.cli.arguments import add_folder, at_least
from ivon_lora.cli.errors import InputError, input_errors
from ivon_lora.cli.saved_run import read_run

LAYOUTS = {
    "uniform": "one rank for all layers, right for every consumer",
    "compact": "smallest, not for llama.cpp",
    "gguf": "smallest, for llama.cpp's convert_lora_to_gguf.py, not for vLLM",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    add_folder(parser)
    layouts = "; ".join(f"{name}: {what}" for name, what in LAYOUTS.items())
    parser.add_argument("--layout", choices=LAYOUTS, default="uniform", help=f"{layouts} (default: uniform)")
    parser.add_argument(
        "--samples", type=at_least(1), metavar="N", help="N posterior samples, an adapter each, into --out"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: beside it, named by layout)")
    parser.add_argument("--overwrite", action="store_true", help="replace the adapter in --out")


def run(arguments: argparse.Namespace) -> tuple[Any, str]:
    """Do what the module's docstring says."""
    found = read_run(arguments.folder, arguments.posterior, arguments.optimizer)
    source = found.folder.resolve()
    out = arguments.out or source.with_name(f"{source.name}-{arguments.layout}")
    if out.exists() and out.samefile(source):
        raise InputError(f"--out {out} is the adapter itself: give another folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not arguments.overwrite:
        raise InputError(f"--out {out} exists: give another folder, or --overwrite to replace the adapter in it")
    # the adapter of a run has lost its pruned ranks already, and its posterior has not
    asked_for = arguments.posterior is not None or arguments.optimizer is not None
    posterior = found.posterior if asked_for or found.report is None else None
    logging.getLogger("ivon_lora.export").setLevel(logging.WARNING)
    with input_errors(source), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say is in the report's notes
        if arguments.samples is None:
            reports = [export_saved(source, out, arguments.layout, posterior)]
        elif posterior is None:
            raise InputError(f"--samples needs a posterior, and {source} has none: give --posterior or --optimizer")
        else:
            reports = []
            for k in range(arguments.samples):
                sample = replace(posterior, mean=posterior.sample(posterior.seed, k))
                reports.append(export_saved(source, out / f"sample-{k}", arguments.layout, sample))
    values = [asdict(report) | {"path": str(report.path)} for report in reports]
    return values if arguments.samples else values[0], "\n".join(map(str, reports))
