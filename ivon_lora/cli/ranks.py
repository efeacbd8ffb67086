"""The verb `ranks`: GeLoRA's ranks for a model and a data file."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ivon_lora.cli.arguments import add_json, add_options, add_verb, at_least, option, positive, print_json
from ivon_lora.cli.env import choose_device, has_fast_bf16
from ivon_lora.cli.errors import input_errors
from ivon_lora.cli.finetune.options import Settings, below_one
from ivon_lora.cli.tables import text_table

if TYPE_CHECKING:
    from ivon_lora import GeloraRanks, IntrinsicDimension

__all__ = ["register_ranks"]

EXAMPLES = """\
ivon-lora ranks                                      film reviews, all-MiniLM-L6-v2
ivon-lora ranks --model distilbert-base-uncased --data reviews.csv --text review
ivon-lora ranks --json > ranks.json                  with rank_pattern and alpha_pattern for peft.LoraConfig
"""
#: options that mean the same as those of `finetune`
SHARED = ("model", "data", "text", "max_length", "batch_size", "seed", "device", "threads")


@dataclass(frozen=True)
class Measurement:
    """Options of this verb alone."""

    texts: int = option(1000, "texts to read, at most", at_least(1), metavar="N")
    points: int = option(5000, "tokens to measure, at most", at_least(3), metavar="N")
    method: str = option("mle", "TwoNN by maximum likelihood or by regression", ("mle", "regression"))
    trim: float = option(0.1, "share of the largest distance ratios to cut off", below_one)
    alpha: float = option(32.0, "alpha / rank", positive)
    precision: str = option("fp32", "of forward passes; auto takes bf16 where it is fast", ("auto", "fp32", "bf16"))


def register_ranks(verbs: Any) -> None:
    """Add the verb `ranks`."""
    parser = add_verb(
        verbs,
        "ranks",
        _run,
        summary="propose LoRA ranks from a model's hidden states, before training",
        description="GeLoRA (arXiv 2412.09250): estimate the intrinsic dimension of the hidden states around every "
        "transformer block; the rank of its layers is max(d_out - d_in, 0) + 1. Needs no labels.",
        examples=EXAMPLES,
    )
    add_options(parser, Settings, SHARED)
    add_options(parser, Measurement)
    add_json(parser)


def _run(arguments: argparse.Namespace) -> int:
    import torch

    from ivon_lora import gelora_ranks
    from ivon_lora.cli.finetune.data import training_texts
    from ivon_lora.cli.finetune.model import load_base, load_tokenizer

    given = vars(arguments)
    s = Settings(**{name: given[name] for name in SHARED if name in given})
    m = Measurement(**{name: given[name] for name in Measurement.__dataclass_fields__ if name in given})
    texts = training_texts(s.data, s.text)[: m.texts]
    device = choose_device(s.device)
    if s.threads is not None:
        torch.set_num_threads(s.threads)
    base = load_base(s.model, seed=s.seed)
    tokenizer = load_tokenizer(s.model, base)
    bf16 = m.precision == "bf16" or (m.precision == "auto" and has_fast_bf16(device))
    with input_errors(f"--model {s.model}"), torch.autocast(device, torch.bfloat16, enabled=bf16):
        ranks = gelora_ranks(
            base.to(device),
            _batches(texts, tokenizer, s.max_length, s.batch_size),
            alpha_over_rank=m.alpha,
            max_points=m.points,
            method=m.method,
            trim=m.trim,
            seed=s.seed,
        )
    print_json(as_json(ranks)) if arguments.json else print(as_text(ranks, len(texts)))
    return 0


def as_json(ranks: GeloraRanks) -> dict[str, Any]:
    """Blocks, and the arguments of ``peft.LoraConfig``."""
    blocks = [
        {"name": block.name, "rank": block.rank, "d_in": asdict(block.d_in), "d_out": asdict(block.d_out)}
        for block in ranks.blocks
    ]
    return {"blocks": blocks, "total": ranks.total, **ranks.lora_arguments()}


def as_text(ranks: GeloraRanks, texts: int) -> str:
    """A table of blocks, and how the numbers came about."""
    rows = [
        [block.name, _with_interval(block.d_in), _with_interval(block.d_out), str(block.rank), str(len(block.modules))]
        for block in ranks.blocks
    ]
    table = text_table(["block", "d_in", "d_out", "rank", "layers"], rows)
    dimensions = [dimension for block in ranks.blocks for dimension in (block.d_in, block.d_out)]
    first = dimensions[0]
    return (
        f"{table}\n\ntotal rank {ranks.total} in {len(ranks.ranks)} layers; alpha / rank {ranks.alpha_over_rank:g}\n"
        f"TwoNN ({first.method}, trim {first.trim:g}) on {_range([d.n_points for d in dimensions])} different tokens of "
        f"{texts} {'text' if texts == 1 else 'texts'}, {_range([d.n_duplicates for d in dimensions])} duplicates dropped\n"
        f"brackets: {100 * first.confidence:g} % interval; its upper end includes the bias of TwoNN in high dimensions"
    )


def _with_interval(dimension: IntrinsicDimension) -> str:
    return f"{dimension.estimate:.1f} [{dimension.low:.1f}, {dimension.high:.1f}]"


def _range(values: list[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else f"{min(values)} to {max(values)}"


def _batches(texts: list[str], tokenizer: Any, max_length: int, size: int) -> Iterator[dict[str, Any]]:
    for start in range(0, len(texts), size):
        part = tokenizer(
            texts[start : start + size], truncation=True, max_length=max_length, padding=True, return_tensors="pt"
        )
        yield {name: part[name] for name in ("input_ids", "attention_mask")}
