"""Propose LoRA ranks from a model's hidden states, before training.

GeLoRA (arXiv:2412.09250): estimate the intrinsic dimension of the hidden states around every transformer block; the
rank of its layers is max(d_out - d_in, 0) + 1. Needs no labels.

examples:
  ivon-lora ranks                                      film reviews, all-MiniLM-L6-v2
  ivon-lora ranks --model distilbert-base-uncased --data reviews.csv --text review
  ivon-lora ranks --json > ranks.json                  with rank_pattern and alpha_pattern for peft.LoraConfig
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ivon_lora import gelora_ranks
from ivon_lora.cli.arguments import add_options, at_least, below_one, chosen, positive, setting
from ivon_lora.cli.errors import input_errors
from ivon_lora.cli.finetune.options import Settings
from ivon_lora.cli.report import text_table

if TYPE_CHECKING:
    from ivon_lora import GeloraRanks


@dataclass(frozen=True)
class Measurement(Settings):
    """Options of this verb, and some of `finetune`."""

    texts: int = setting(1000, "texts to read, at most", at_least(1), "N")
    points: int = setting(5000, "tokens to measure, at most", at_least(3), "N")
    method: str = setting("mle", "TwoNN by maximum likelihood or by regression", ("mle", "regression"))
    trim: float = setting(0.1, "share of the largest distance ratios to cut off", below_one)
    alpha: float = setting(32.0, "alpha / rank", positive)


SHARED = ("model", "data", "text", "max_length", "batch_size", "seed", "device", "threads")
OPTIONS = (*Measurement.__annotations__, *SHARED)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    add_options(parser, Measurement, OPTIONS)


def run(arguments: argparse.Namespace) -> tuple[Any, str]:
    """Do what the module's docstring says."""
    from ivon_lora.cli.finetune.data import training_texts
    from ivon_lora.cli.finetune.model import load_base, load_tokenizer
    from ivon_lora.cli.training import prepare

    s = Measurement(**chosen(arguments, Measurement))
    device = prepare(s)
    texts = training_texts(s.data, s.text)[: s.texts]
    base = load_base(s.model, seed=s.seed).to(device)
    tokenizer = load_tokenizer(s.model, base)

    def batch(start: int) -> dict[str, Any]:
        part = texts[start : start + s.batch_size]
        tokens = tokenizer(part, truncation=True, max_length=s.max_length, padding=True, return_tensors="pt")
        return {name: tokens[name] for name in ("input_ids", "attention_mask")}

    batches = map(batch, range(0, len(texts), s.batch_size))
    options = {"alpha_over_rank": s.alpha, "max_points": s.points, "method": s.method, "trim": s.trim, "seed": s.seed}
    with input_errors(f"--model {s.model}"):
        ranks = gelora_ranks(base, batches, **options)  # type: ignore[arg-type]
    return as_json(ranks), as_text(ranks, len(texts))


def as_json(ranks: GeloraRanks) -> dict[str, Any]:
    """Blocks, and the arguments of ``peft.LoraConfig``."""
    blocks = [{key: value for key, value in asdict(block).items() if key != "modules"} for block in ranks.blocks]
    return {"blocks": blocks, "total": ranks.total, **ranks.lora_arguments()}


def as_text(ranks: GeloraRanks, texts: int) -> str:
    """A table of blocks, and how the numbers came about."""
    rows = []
    for block in ranks.blocks:
        dimensions = [f"{d.estimate:.1f} [{d.low:.1f}, {d.high:.1f}]" for d in (block.d_in, block.d_out)]
        rows.append([block.name, *dimensions, str(block.rank), str(len(block.modules))])
    measured = [d for block in ranks.blocks for d in (block.d_in, block.d_out)]
    points, duplicates = min(d.n_points for d in measured), max(d.n_duplicates for d in measured)
    first, table = measured[0], text_table(["block", "d_in", "d_out", "rank", "layers"], rows)
    return (
        f"{table}\n\ntotal rank {ranks.total} in {len(ranks.ranks)} layers; alpha / rank {ranks.alpha_over_rank:g}\n"
        f"TwoNN ({first.method}, trim {first.trim:g}) on {points} or more different tokens of {texts} texts, "
        f"{duplicates} duplicates or fewer dropped\n"
        f"brackets: {100 * first.confidence:g} % interval; its upper end includes the bias of TwoNN in high dimensions"
    )
