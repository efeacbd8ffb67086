"""Every option of `finetune`: its default, its bounds, and which of them go together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ivon_lora.cli.arguments import at_least, bounded, option, positive
from ivon_lora.cli.errors import InputError

DEFAULT_MODEL = "all-MiniLM-L6-v2"
CRITERIA = ("snr_abs", "snr", "magnitude", "inverse_std", "sensitivity")
#: options that only one recipe of ivon reads
RECIPE_OPTIONS = {"auto": ("temperature", "prior_std"), "published": ("ess", "hess_init", "clip_radius", "beta2")}

# Learning rates by optimizer, or by recipe and layers of ivon; chosen on the validation split of the default data.
DEFAULT_LR = {"adamw": 3e-3, "adalora": 1e-2}
IVON_LR = {("auto", "adalora"): 1e-2, ("auto", "lora"): 3e-3, ("published", "adalora"): 2.0, ("published", "lora"): 1.0}
DEFAULT_RANK = {"ivon": 12, "adamw": 8, "adalora": 12}
DEFAULT_TARGET_RANK = 4

not_negative = bounded(float, lambda value: 0 <= value < float("inf"), "must be 0 or a positive number")
below_one = bounded(float, lambda value: 0 <= value < 1, "is outside [0, 1): give for example 0.99999")
share_or_steps = bounded(
    lambda text: int(text) if text.isdecimal() else float(text),
    lambda value: value >= 0 and (isinstance(value, int) or value <= 1),
    "must be a number of steps (20) or a share of them (0.1)",
)
PRUNING = "pruning (S is a number of steps, or a share of them: 20 or 0.1)"
OPTIMIZERS = "ivon: prunes ranks in its step; adamw: plain LoRA, no pruning; adalora: PEFT's AdaLoRA with AdamW"
WEIGHT_DECAY = "of adamw and adalora; ivon, published: curvature of the prior (default: 0)"
RECIPES = "ivon: auto (AdamW's learning rate) or published (the IVON paper's settings, --lr 2)"


@dataclass(frozen=True)
class Settings:
    """A run. `make_settings` fills in what depends on the optimizer."""

    model: str = option(DEFAULT_MODEL, "folder or hub name of a Hugging Face model", group="input")
    data: str | None = option(None, ".csv with a header or .jsonl (default: film-review sentences)", metavar="FILE")
    text: str = option("text", "column with the text", metavar="COLUMN")
    label: str = option("label", "column with the class", metavar="COLUMN")
    max_length: int = option(48, "tokens a text is cut at", at_least(4), "N")

    optimizer: str = option("ivon", OPTIMIZERS, ("ivon", "adamw", "adalora"), group="optimizer")
    steps: int = option(200, "optimizer steps", at_least(1), "N")
    batch_size: int = option(32, "texts a step", at_least(1), "N")
    lr: float = option(None, "peak learning rate (default: 0.01; adamw and --layers lora: 0.003)", positive)
    lr_warmup: int | float = option(0.06, "linear warm-up of it", share_or_steps, "S")
    recipe: str = option("auto", RECIPES, ("auto", "published"))
    temperature: float | None = option(None, "ivon: 1 is Bayes' rule, less is less noise (default: 0.01)", positive)
    prior_std: float | None = option(None, "ivon: largest noise of a weight (default: see VAdam)", positive)
    weight_decay: float | None = option(None, WEIGHT_DECAY, not_negative)
    ess: float = option(1e7, "ivon, published: effective sample size, larger is less noise", positive)
    hess_init: float = option(1e-3, "ivon, published: initial Hessian", positive)
    clip_radius: float = option(1e-3, "ivon, published: bound of an element of a step", positive)
    beta2: float = option(0.99999, "ivon, published: decay of the Hessian", below_one)

    rank: int = option(None, "initial rank of every layer (default: 12; adamw: 8)", at_least(1), "R", PRUNING)
    target_rank: int = option(None, "mean rank at the end (default: 4)", at_least(1), "R")
    criterion: str = option("snr_abs", "what makes a rank important", CRITERIA)
    layers: str = option("adalora", "ivon: adalora (A, B and a gate E per rank) or lora", ("adalora", "lora"))
    warmup: int | float = option(0.1, "before pruning", share_or_steps, "S")
    final: int | float = option(0.4, "at the end, ranks fixed", share_or_steps, "S")
    interval: int | float = option(0.05, "between prunings", share_or_steps, "S")

    out: str = option("runs/finetune", "folder of the run", metavar="DIR", group="run")
    seed: int = option(0, "of everything random", at_least(0))
    samples: int = option(8, "ivon: posterior samples to average", at_least(1), "N")
    eval_limit: int = option(300, "ivon: texts of each test set for the averages, 0 for all", at_least(0), "N")
    device: str = option("auto", "where to compute", ("auto", "cpu", "cuda"))
    precision: str = option("auto", "auto: bf16 where it is fast", ("auto", "fp32", "bf16"))
    threads: int | None = option(None, "of torch on the CPU (default: torch's choice)", at_least(1), "N")
    save_every: int = option(50, "steps between checkpoints", at_least(1), "N")
    log_every: int = option(10, "steps between entries of the log", at_least(1), "N")


def make_settings(chosen: dict[str, Any]) -> Settings:
    """Settings with the values chosen by name, and defaults that suit the optimizer.

    Raises:
        InputError: values that do not go together, with the options to change.
    """
    s = Settings(**chosen)
    rank = s.rank or DEFAULT_RANK[s.optimizer]
    target = s.target_rank or (rank if s.optimizer == "adamw" else min(DEFAULT_TARGET_RANK, rank))
    lr = s.lr or (IVON_LR[s.recipe, s.layers] if s.optimizer == "ivon" else DEFAULT_LR[s.optimizer])
    if target > rank:
        raise InputError(f"--target-rank {target} is above --rank {rank}: lower it or raise --rank")
    if s.optimizer == "adamw" and target != rank:
        raise InputError(f"--target-rank {target} with --optimizer adamw: it never prunes; drop it or use ivon")
    if s.optimizer == "adalora" and target == rank:
        raise InputError(f"--target-rank {rank} equals --rank: PEFT's AdaLoRA needs ranks to prune; lower it")
    warmup, final = as_steps(s.warmup, s.steps), as_steps(s.final, s.steps)
    if s.optimizer != "adamw" and s.steps < warmup + final + 1:
        phases = f"--warmup {s.warmup} and --final {s.final} ({warmup} + {final} steps, and 1 or more to prune)"
        raise InputError(f"--steps {s.steps} is too few for {phases}: raise --steps, or lower one of them")
    for recipe, names in RECIPE_OPTIONS.items() if s.optimizer == "ivon" else ():
        unread = [f"--{name.replace('_', '-')}" for name in names if name in chosen]
        if recipe != s.recipe and unread:
            raise InputError(f"{unread[0]} is read with --recipe {recipe} only: add it, or drop the option")
    if (s.optimizer, s.recipe) == ("ivon", "auto") and s.weight_decay is not None:
        raise InputError("--weight-decay is not read with --recipe auto: --prior-std says how wide the prior is")
    return replace(s, rank=rank, target_rank=target, lr=lr)


def as_steps(value: int | float, steps: int) -> int:
    """Steps for an int; for a float, that share of ``steps``, rounded."""
    return value if isinstance(value, int) else round(value * steps)
