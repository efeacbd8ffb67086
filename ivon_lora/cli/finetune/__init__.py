"""Fine-tune a text classifier with LoRA, prune its ranks and say how good it is.

The Hugging Face Trainer trains; IVON, its optimizer, prunes ranks inside its step and leaves a posterior. In --out:
adapter/ (plain LoRA), posterior.safetensors, predictions.safetensors, report.json, pictures, checkpoint-N.

examples:
  ivon-lora finetune                                   all defaults: film reviews, all-MiniLM-L6-v2, ranks 12 -> 4
  ivon-lora finetune --target-rank 2 --out runs/r2     keep 2 ranks a layer on average
  ivon-lora finetune --optimizer adamw --out runs/adamw                plain LoRA
  ivon-lora finetune --method cola --option links=4 --out runs/cola    a related method; the list is below
  ivon-lora finetune --data mails.csv --text body --label folder --out runs/mails
  ivon-lora finetune --model distilbert-base-uncased --data reviews.jsonl --out runs/bert
  ivon-lora finetune --runs 3 --out runs/three         three seeds, in seed0, seed1, seed2, and their mixture
  ivon-lora finetune --resume --out runs/r2            go on after Ctrl-C, with the same numbers
"""

from __future__ import annotations

import argparse
from typing import Any

from ivon_lora.cli.arguments import add_options, at_least, chosen
from ivon_lora.cli.finetune.methods import METHODS
from ivon_lora.cli.finetune.options import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    add_options(parser, Settings)
    parser.add_argument("--runs", type=at_least(1), default=1, metavar="N", help="runs with seeds from --seed on")
    parser.add_argument("--resume", action="store_true", help="go on with the interrupted run in --out")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    parser.epilog = "methods:\n" + "\n".join(f"  {name:<11}{method.text}" for name, method in METHODS.items())


def run(arguments: argparse.Namespace) -> tuple[Any, str]:
    """Do what the module's docstring says; `train` is where to read on."""
    from ivon_lora.cli.finetune.train import finetune_runs

    return finetune_runs(chosen(arguments, Settings), arguments.runs, arguments.resume, arguments.overwrite)
