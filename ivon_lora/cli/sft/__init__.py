"""Fine-tune a language model with LoRA on texts, prompts or chats, prune its ranks and say how good it is.

TRL's SFTTrainer trains; IVON, its optimizer, prunes ranks inside its step and leaves a posterior. In --out: adapter/
(plain LoRA), posterior.safetensors, report.json, pictures.

examples:
  ivon-lora sft                                        all defaults: signatures and docstrings, SmolLM2-135M, 12 -> 4
  ivon-lora sft --data chats.jsonl --out runs/chats    lines with "messages", with "prompt" and "completion", or "text"
  ivon-lora sft --data novel.txt                       paragraphs, with empty lines between them
  ivon-lora sft --model Qwen/Qwen3-0.6B --quantize nf4 --data chats.jsonl
"""

from __future__ import annotations

import argparse
from typing import Any

from ivon_lora.cli.arguments import add_options, chosen
from ivon_lora.cli.sft.options import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    add_options(parser, Settings)
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --out")


def run(arguments: argparse.Namespace) -> tuple[Any, str]:
    """Do what the module's docstring says; `train` is where to read on."""
    from ivon_lora.cli.sft.train import sft

    return sft(Settings(**chosen(arguments, Settings)), arguments.overwrite)
