"""The verb `finetune`: train a text classifier and prune its ranks."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

from ivon_lora.cli.arguments import add_verb
from ivon_lora.finetune.settings import (
    CRITERIA,
    DEFAULT_LR,
    DEFAULT_MODEL,
    DEFAULT_RANK,
    DEVICES,
    GATED_LR,
    LAYERS,
    OPTIMIZERS,
    PRECISIONS,
    PUBLISHED_LR,
    RECIPES,
    Settings,
)

__all__ = ["register_finetune"]

EXAMPLES = """\
ivon-lora finetune                                   all defaults: film reviews, all-MiniLM-L6-v2, ranks 12 -> 4
ivon-lora finetune --target-rank 2 --out runs/r2     keep 2 ranks a layer on average
ivon-lora finetune --optimizer adamw --out runs/adamw
ivon-lora finetune --data mails.csv --text body --label folder --out runs/mails
ivon-lora finetune --model distilbert-base-uncased --data reviews.jsonl --out runs/bert
ivon-lora finetune --resume --out runs/r2            go on after Ctrl-C, with the same numbers
"""


def register_finetune(verbs: Any) -> None:
    """Add the verb `finetune`."""
    parser = add_verb(
        verbs,
        "finetune",
        _run,
        summary="fine-tune a classifier with LoRA and prune its ranks",
        description="Fine-tune a text classifier with LoRA. IVON prunes its ranks inside its step, with a posterior.",
        examples=EXAMPLES,
        argument_default=argparse.SUPPRESS,
    )
    _add_input(parser.add_argument_group("input"))
    _add_optimizer(parser.add_argument_group("optimizer"))
    _add_pruning(parser.add_argument_group("pruning (a number of steps, or a share of them: 20 or 0.1)"))
    _add_run(parser.add_argument_group("run"))


def _add_input(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", help=f"folder or hub name of a Hugging Face model (default: {DEFAULT_MODEL})")
    group.add_argument(
        "--data", metavar="FILE", help=".csv with a header or .jsonl (default: rated film-review sentences)"
    )
    group.add_argument("--text", metavar="COLUMN", help=f"column with the text (default: {Settings.text})")
    group.add_argument("--label", metavar="COLUMN", help=f"column with the class (default: {Settings.label})")
    group.add_argument(
        "--max-length", type=int, metavar="N", help=f"tokens a text is cut at (default: {Settings.max_length})"
    )


def _add_optimizer(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--optimizer",
        help=f"{', '.join(OPTIMIZERS)} (default: {Settings.optimizer}); "
        "adamw: plain LoRA, no pruning; adalora: PEFT's AdaLoRA with AdamW",
    )
    group.add_argument("--steps", type=int, metavar="N", help=f"optimizer steps (default: {Settings.steps})")
    group.add_argument("--batch-size", type=int, metavar="N", help=f"texts a step (default: {Settings.batch_size})")
    rates = ", ".join(f"{name} {rate:g}" for name, rate in DEFAULT_LR.items())
    group.add_argument(
        "--lr", type=float, help=f"peak learning rate (default: {rates}; ivon with --layers adalora {GATED_LR:g})"
    )
    group.add_argument(
        "--lr-warmup", type=_share_or_steps, metavar="S", help=f"linear warm-up of it (default: {Settings.lr_warmup})"
    )
    group.add_argument(
        "--recipe",
        help=f"ivon: {RECIPES[0]} (AdamW's learning rate, the posterior finds its own size) or {RECIPES[1]} (the "
        f"settings of the IVON paper, with --lr {PUBLISHED_LR['adalora']:g}) (default: {Settings.recipe})",
    )
    group.add_argument(
        "--temperature",
        type=float,
        help="ivon: sharpens the posterior; 1 is Bayes' rule, less is less noise (default: 3e-3, and less for learning "
        "rates below 3e-3)",
    )
    group.add_argument(
        "--weight-decay",
        type=float,
        help="ivon: curvature that every weight is given beforehand (default: from the number of texts; published: 0); "
        "adamw, adalora: its own (default: 0)",
    )
    published = "ivon, published:"
    group.add_argument(
        "--ess", type=float, help=f"{published} effective sample size, larger is less noise (default: {Settings.ess:g})"
    )
    group.add_argument("--hess-init", type=float, help=f"{published} initial Hessian (default: {Settings.hess_init:g})")
    group.add_argument(
        "--clip-radius",
        type=float,
        help=f"{published} bound of an element of a step (default: {Settings.clip_radius:g})",
    )
    group.add_argument("--beta2", type=float, help=f"{published} decay of the Hessian (default: {Settings.beta2})")


def _add_pruning(group: argparse._ArgumentGroup) -> None:
    ranks = ", ".join(f"{name} {rank}" for name, rank in DEFAULT_RANK.items())
    group.add_argument("--rank", type=int, metavar="R", help=f"initial rank of every layer (default: {ranks})")
    group.add_argument("--target-rank", type=int, metavar="R", help="mean rank at the end (default: 4)")
    group.add_argument(
        "--criterion", help=f"what makes a rank important: {', '.join(CRITERIA)} (default: {Settings.criterion})"
    )
    group.add_argument(
        "--layers",
        help=f"ivon: {LAYERS[0]} (A, B and a gate E per rank) or {LAYERS[1]} (A and B) (default: {Settings.layers})",
    )
    group.add_argument(
        "--warmup", type=_share_or_steps, metavar="S", help=f"before pruning (default: {Settings.warmup})"
    )
    group.add_argument(
        "--final", type=_share_or_steps, metavar="S", help=f"at the end, ranks fixed (default: {Settings.final})"
    )
    group.add_argument(
        "--interval", type=_share_or_steps, metavar="S", help=f"between prunings (default: {Settings.interval})"
    )


def _add_run(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--out", metavar="DIR", help=f"folder of the run (default: {Settings.out})")
    group.add_argument("--resume", action="store_true", help="go on with the interrupted run in --out")
    group.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    group.add_argument("--json", action="store_true", help="print the report as JSON on stdout instead of tables")
    group.add_argument("--seed", type=int, help=f"of everything random (default: {Settings.seed})")
    group.add_argument(
        "--samples", type=int, metavar="N", help=f"ivon: posterior samples to average (default: {Settings.samples})"
    )
    group.add_argument(
        "--eval-limit",
        type=int,
        metavar="N",
        help=f"ivon: texts of each test set for the averages, 0 for all (default: {Settings.eval_limit})",
    )
    group.add_argument("--device", help=f"{', '.join(DEVICES)} (default: {Settings.device})")
    group.add_argument(
        "--precision", help=f"{', '.join(PRECISIONS)} (default: {Settings.precision}: bf16 where it is fast)"
    )
    group.add_argument("--threads", type=int, metavar="N", help="of torch on the CPU (default: torch's choice)")
    group.add_argument(
        "--save-every", type=int, metavar="N", help=f"steps between checkpoints (default: {Settings.save_every})"
    )
    group.add_argument(
        "--log-every",
        type=int,
        metavar="N",
        help=f"steps between lines where output is not a terminal (default: {Settings.log_every})",
    )


def _share_or_steps(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def _run(arguments: argparse.Namespace) -> int:
    from ivon_lora.finetune.run import finetune

    chosen = {
        name: value
        for name, value in vars(arguments).items()
        if name not in {"run", "verb", "resume", "overwrite", "json"}
    }
    as_json = hasattr(arguments, "json")
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        status = finetune(chosen, resume=hasattr(arguments, "resume"), overwrite=hasattr(arguments, "overwrite"))
    if as_json and status == 0:
        report = Path(chosen.get("out", Settings.out)) / "report.json"
        print(report.read_text(encoding="utf-8"), end="")
    return status
