"""The verb `ranks`: GeLoRA's ranks for a model and a data file."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ivon_lora.cli.arguments import add_json, add_verb, print_json
from ivon_lora.finetune.errors import InputError, one_line
from ivon_lora.finetune.settings import DEFAULT_MODEL, DEVICES, PRECISIONS, Settings, make_settings
from ivon_lora.finetune.text_table import text_table

if TYPE_CHECKING:
    from ivon_lora.lora.gelora import GeloraRanks
    from ivon_lora.lora.intrinsic_dimension import IntrinsicDimension

__all__ = ["register_ranks"]

EXAMPLES = """\
ivon-lora ranks                                      film reviews, all-MiniLM-L6-v2
ivon-lora ranks --model distilbert-base-uncased --data reviews.csv --text review
ivon-lora ranks --json > ranks.json                  with rank_pattern and alpha_pattern for peft.LoraConfig
"""

TEXTS = 1000
POINTS = 5000
ALPHA_OVER_RANK = 32.0
METHODS = ("mle", "regression")


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
    add = parser.add_argument
    add(
        "--model", default=Settings.model, help=f"folder or hub name of a Hugging Face model (default: {DEFAULT_MODEL})"
    )
    add("--data", metavar="FILE", help=".csv with a header or .jsonl (default: rated film-review sentences)")
    add("--text", metavar="COLUMN", default=Settings.text, help=f"column with the text (default: {Settings.text})")
    add("--texts", type=int, metavar="N", default=TEXTS, help=f"texts to read, at most (default: {TEXTS})")
    add("--points", type=int, metavar="N", default=POINTS, help=f"tokens to measure, at most (default: {POINTS})")
    add("--method", default="mle", help=f"TwoNN by {' or '.join(METHODS)} (default: mle)")
    add("--trim", type=float, default=0.1, help="share of the largest distance ratios to cut off (default: 0.1)")
    add("--alpha", type=float, default=ALPHA_OVER_RANK, help=f"alpha / rank (default: {ALPHA_OVER_RANK:g})")
    add(
        "--max-length",
        type=int,
        metavar="N",
        default=Settings.max_length,
        help=f"tokens a text is cut at (default: {Settings.max_length})",
    )
    add(
        "--batch-size",
        type=int,
        metavar="N",
        default=Settings.batch_size,
        help=f"texts a pass (default: {Settings.batch_size})",
    )
    add("--seed", type=int, default=Settings.seed, help=f"of the sample of tokens (default: {Settings.seed})")
    add("--device", default=Settings.device, help=f"{', '.join(DEVICES)} (default: {Settings.device})")
    add("--precision", default="fp32", help=f"of forward passes: {', '.join(PRECISIONS)} (default: fp32)")
    add("--threads", type=int, metavar="N", help="of torch on the CPU (default: torch's choice)")
    add_json(parser)


def _run(arguments: argparse.Namespace) -> int:
    from ivon_lora.finetune.model import fit_padding, load_base, load_tokenizer
    from ivon_lora.finetune.runtime import Runtime
    from ivon_lora.finetune.texts import training_texts
    from ivon_lora.lora.gelora import gelora_ranks

    _check(arguments)
    texts = training_texts(arguments.data, arguments.text)[: arguments.texts]
    runtime = Runtime(arguments.device, arguments.precision, arguments.threads)
    tokenizer = load_tokenizer(arguments.model)
    base = load_base(arguments.model, seed=arguments.seed)
    fit_padding(base, tokenizer)
    try:
        with runtime.autocast():
            ranks = gelora_ranks(
                base.to(runtime.device),
                _batches(texts, tokenizer, arguments.max_length, arguments.batch_size),
                alpha_over_rank=arguments.alpha,
                max_points=arguments.points,
                method=arguments.method,
                trim=arguments.trim,
                seed=arguments.seed,
            )
    except ValueError as error:
        raise InputError(f"--model {arguments.model}: {one_line(error, 300)}") from error
    print_json(as_json(ranks)) if arguments.json else print(as_text(ranks, len(texts)))
    return 0


def as_json(ranks: GeloraRanks) -> dict[str, Any]:
    """Blocks, and the arguments of ``peft.LoraConfig``."""
    return {
        "blocks": [
            {"name": block.name, "rank": block.rank, "d_in": asdict(block.d_in), "d_out": asdict(block.d_out)}
            for block in ranks.blocks
        ],
        "total": ranks.total,
        **ranks.lora_arguments(),
    }


def as_text(ranks: GeloraRanks, texts: int) -> str:
    """A table of blocks, and how the numbers came about."""
    rows = [
        [block.name, _with_interval(block.d_in), _with_interval(block.d_out), str(block.rank), str(len(block.modules))]
        for block in ranks.blocks
    ]
    table = text_table(["block", "d_in", "d_out", "rank", "layers"], rows)
    dimensions = [dimension for block in ranks.blocks for dimension in (block.d_in, block.d_out)]
    points = [dimension.n_points for dimension in dimensions]
    duplicates = [dimension.n_duplicates for dimension in dimensions]
    used = f"{dimensions[0].method}, trim {dimensions[0].trim:g}"
    confidence = f"{100 * dimensions[0].confidence:g} %"
    return (
        f"{table}\n\ntotal rank {ranks.total} in {len(ranks.ranks)} layers; alpha / rank {ranks.alpha_over_rank:g}\n"
        f"TwoNN ({used}) on {_range(points)} different tokens of {texts} {'text' if texts == 1 else 'texts'}, "
        f"{_range(duplicates)} duplicates dropped\n"
        f"brackets: {confidence} interval; its upper end includes the bias of TwoNN in high dimensions"
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


def _check(arguments: argparse.Namespace) -> None:
    shared = ("model", "data", "text", "max_length", "batch_size", "seed", "device", "precision", "threads")
    make_settings({name: getattr(arguments, name) for name in shared})
    if arguments.method not in METHODS:
        raise InputError(f"--method {arguments.method!r} is unknown: choose {', '.join(METHODS)}")
    for name, bound in (("texts", 1), ("points", 3)):
        if getattr(arguments, name) < bound:
            raise InputError(f"--{name} {getattr(arguments, name)} is too small: give {bound} or more")
    if not 0 <= arguments.trim < 1:
        raise InputError(f"--trim {arguments.trim} is outside [0, 1): give for example 0.1")
    if not 0 < arguments.alpha < float("inf"):
        raise InputError(f"--alpha {arguments.alpha} must be a positive number")
