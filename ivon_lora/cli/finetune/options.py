"""The verb `finetune`: its options, what they default to and what goes together."""

from __future__ import annotations

import argparse
import contextlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ivon_lora.cli.arguments import add_json, add_options, add_verb, at_least, option, positive
from ivon_lora.cli.errors import InputError

__all__ = ["DEFAULT_MODEL", "FREE_ON_RESUME", "Settings", "as_steps", "make_settings", "register_finetune"]

DEFAULT_MODEL = "all-MiniLM-L6-v2"
OPTIMIZERS = ("ivon", "adamw", "adalora")
CRITERIA = ("snr_abs", "snr", "magnitude", "inverse_std", "sensitivity")
DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "fp32", "bf16")

#: what --resume may change: nothing that the trained numbers depend on
FREE_ON_RESUME = ("out", "threads", "samples", "eval_limit", "save_every")
#: options that only one recipe of ivon reads
RECIPE_OPTIONS = {"auto": ("temperature", "prior_std"), "published": ("ess", "hess_init", "clip_radius", "beta2")}

# Learning rates by optimizer, or by recipe and layers of ivon; chosen on the validation split of the default data.
DEFAULT_LR = {"adamw": 3e-3, "adalora": 1e-2}
IVON_LR = {("auto", "adalora"): 1e-2, ("auto", "lora"): 3e-3, ("published", "adalora"): 2.0, ("published", "lora"): 1.0}
DEFAULT_RANK = {"ivon": 12, "adamw": 8, "adalora": 12}
DEFAULT_TARGET_RANK = 4

EXAMPLES = """\
ivon-lora finetune                                   all defaults: film reviews, all-MiniLM-L6-v2, ranks 12 -> 4
ivon-lora finetune --target-rank 2 --out runs/r2     keep 2 ranks a layer on average
ivon-lora finetune --optimizer adamw --out runs/adamw
ivon-lora finetune --data mails.csv --text body --label folder --out runs/mails
ivon-lora finetune --model distilbert-base-uncased --data reviews.jsonl --out runs/bert
ivon-lora finetune --resume --out runs/r2            go on after Ctrl-C, with the same numbers
"""


def share_or_steps(text: str) -> int | float:
    """The type of an option that is a number of steps (20) or a share of them (0.1)."""
    value = int(text) if text.isdecimal() else float(text)
    if not 0 <= value <= (1 if isinstance(value, float) else float("inf")):
        raise argparse.ArgumentTypeError(f"{text} must be a number of steps (20) or a share of them (0.1)")
    return value


def not_negative(text: str) -> float:
    """The type of an option that is 0 or a positive, finite number."""
    return 0.0 if float(text) == 0 else positive(text)


def below_one(text: str) -> float:
    """The type of an option in [0, 1)."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is outside [0, 1): give for example 0.99999")
    return value


@dataclass(frozen=True)
class Settings:
    """A run. `make_settings` fills in what depends on the optimizer."""

    model: str = option(DEFAULT_MODEL, "folder or hub name of a Hugging Face model", group="input")
    data: str | None = option(
        None, ".csv with a header or .jsonl (default: rated film-review sentences)", metavar="FILE"
    )
    text: str = option("text", "column with the text", metavar="COLUMN")
    label: str = option("label", "column with the class", metavar="COLUMN")
    max_length: int = option(48, "tokens a text is cut at", at_least(4), metavar="N")

    optimizer: str = option(
        "ivon",
        "ivon: prunes ranks in its step; adamw: plain LoRA, no pruning; adalora: PEFT's AdaLoRA with AdamW",
        OPTIMIZERS,
        group="optimizer",
    )
    steps: int = option(200, "optimizer steps", at_least(1), metavar="N")
    batch_size: int = option(32, "texts a step", at_least(1), metavar="N")
    lr: float | None = option(
        None, "peak learning rate (default: ivon 0.01, with --layers lora 0.003; adamw 0.003; adalora 0.01)", positive
    )
    lr_warmup: int | float = option(0.06, "linear warm-up of it", share_or_steps, metavar="S")
    recipe: str = option(
        "auto",
        "ivon: auto, AdamW's learning rate and a posterior that finds its own size; or published, the settings of the "
        "IVON paper with --lr 2",
        ("auto", "published"),
    )
    temperature: float | None = option(
        None,
        "ivon: sharpens the posterior; 1 is Bayes' rule, less is less noise (default: 3e-3, and less for learning "
        "rates below 3e-3)",
        positive,
    )
    prior_std: float | None = option(
        None, "ivon: largest noise of a weight (default: from the number of texts, then found by the data)", positive
    )
    weight_decay: float | None = option(
        None, "of adamw and adalora; of ivon with --recipe published: curvature of the prior (default: 0)", not_negative
    )
    ess: float = option(1e7, "ivon, published: effective sample size, larger is less noise", positive)
    hess_init: float = option(1e-3, "ivon, published: initial Hessian", positive)
    clip_radius: float = option(1e-3, "ivon, published: bound of an element of a step", positive)
    beta2: float = option(0.99999, "ivon, published: decay of the Hessian", below_one)

    rank: int | None = option(
        None,
        "initial rank of every layer (default: 12, adamw 8)",
        at_least(1),
        group="pruning (S is a number of steps, or a share of them: 20 or 0.1)",
        metavar="R",
    )
    target_rank: int | None = option(None, "mean rank at the end (default: 4)", at_least(1), metavar="R")
    criterion: str = option("snr_abs", "what makes a rank important", CRITERIA)
    layers: str = option("adalora", "ivon: adalora (A, B and a gate E per rank) or lora (A and B)", ("adalora", "lora"))
    warmup: int | float = option(0.1, "before pruning", share_or_steps, metavar="S")
    final: int | float = option(0.4, "at the end, ranks fixed", share_or_steps, metavar="S")
    interval: int | float = option(0.05, "between prunings", share_or_steps, metavar="S")

    out: str = option("runs/finetune", "folder of the run", group="run", metavar="DIR")
    seed: int = option(0, "of everything random", at_least(0))
    samples: int = option(8, "ivon: posterior samples to average", at_least(1), metavar="N")
    eval_limit: int = option(300, "ivon: texts of each test set for the averages, 0 for all", at_least(0), metavar="N")
    device: str = option("auto", "where to compute", DEVICES)
    precision: str = option("auto", "auto takes bf16 where it is fast", PRECISIONS)
    threads: int | None = option(None, "of torch on the CPU (default: torch's choice)", at_least(1), metavar="N")
    save_every: int = option(50, "steps between checkpoints", at_least(1), metavar="N")
    log_every: int = option(10, "steps between entries of the log", at_least(1), metavar="N")


def make_settings(chosen: dict[str, Any]) -> Settings:
    """Settings with the values chosen by name, and defaults that suit the optimizer.

    Raises:
        InputError: values that do not go together, with the options to change.
    """
    s = Settings(**chosen)
    rank = DEFAULT_RANK[s.optimizer] if s.rank is None else s.rank
    target = rank if s.optimizer == "adamw" else min(DEFAULT_TARGET_RANK, rank)
    lr = IVON_LR[s.recipe, s.layers] if s.optimizer == "ivon" else DEFAULT_LR[s.optimizer]
    s = replace(s, rank=rank, target_rank=s.target_rank or target, lr=s.lr or lr)
    assert s.target_rank is not None
    if s.target_rank > rank:
        raise InputError(f"--target-rank {s.target_rank} is above --rank {rank}: lower it or raise --rank")
    if s.optimizer == "adamw" and s.target_rank != rank:
        raise InputError(f"--target-rank {s.target_rank} with --optimizer adamw: it never prunes; drop it or use ivon")
    if s.optimizer == "adalora" and s.target_rank == rank:
        raise InputError(f"--target-rank {rank} equals --rank: PEFT's AdaLoRA needs ranks to prune; lower it")
    warmup, final = as_steps(s.warmup, s.steps), as_steps(s.final, s.steps)
    if s.optimizer != "adamw" and s.steps < warmup + final + 1:
        phases = f"--warmup {s.warmup} and --final {s.final} ({warmup} + {final} steps, and 1 or more to prune)"
        raise InputError(f"--steps {s.steps} is too few for {phases}: raise --steps, or lower one of them")
    if s.optimizer == "ivon":
        for recipe, names in RECIPE_OPTIONS.items():
            unread = [f"--{name.replace('_', '-')}" for name in names if name in chosen]
            if recipe != s.recipe and unread:
                raise InputError(f"{unread[0]} is read with --recipe {recipe} only: add it, or drop the option")
        if s.recipe == "auto" and s.weight_decay is not None:
            raise InputError("--weight-decay is not read with --recipe auto: --prior-std says how wide the prior is")
    return s


def as_steps(value: int | float, steps: int) -> int:
    """Steps for an int; for a float, that share of ``steps``, rounded."""
    return value if isinstance(value, int) else round(value * steps)


def register_finetune(verbs: Any) -> None:
    """Add the verb `finetune`."""
    parser = add_verb(
        verbs,
        "finetune",
        _run,
        summary="fine-tune a classifier with LoRA and prune its ranks",
        description="Fine-tune a text classifier with LoRA. IVON prunes its ranks inside its step, with a posterior.",
        examples=EXAMPLES,
    )
    add_options(parser, Settings)
    parser.add_argument("--resume", action="store_true", help="go on with the interrupted run in --out")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    add_json(parser, "the report as JSON on stdout instead of tables")


def _run(arguments: argparse.Namespace) -> int:
    from ivon_lora.cli.finetune.train import finetune

    chosen = dict(vars(arguments))
    resume, overwrite, as_json = (chosen.pop(name) for name in ("resume", "overwrite", "json"))
    for name in ("run", "verb"):
        del chosen[name]
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        status = finetune(chosen, resume, overwrite)
    if as_json and status == 0:
        print((Path(chosen.get("out", Settings.out)) / "report.json").read_text(encoding="utf-8"), end="")
    return status
