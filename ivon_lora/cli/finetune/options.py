"""Every option of `finetune`: its default, its bounds, and which of them go together."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ivon_lora.cli.arguments import (
    RunSettings,
    as_steps,
    at_least,
    below_one,
    not_negative,
    positive,
    setting,
    share_or_steps,
)
from ivon_lora.cli.errors import InputError, input_errors
from ivon_lora.cli.finetune.methods import METHODS
from ivon_lora.functional.importance import CRITERIA

DEFAULT_MODEL = "all-MiniLM-L6-v2"
#: options that only one recipe of ivon reads
RECIPE_OPTIONS = {
    "auto": ("temperature", "prior_std"),
    "published": ("weight_decay", "ess", "hess_init", "clip_radius", "beta2"),
}
PUBLISHED_LR = {"adalora": 2.0}  # of the recipe "published"; 1.0 with every other method

PRUNING = "pruning (S is a number of steps, or a share of them: 20 or 0.1)"
TARGET_RANK = "mean rank at the end (default: 4), of adalora and, with ivon, lora"
WEIGHT_DECAY = "of adamw; ivon, published: curvature of the prior (default: 0)"
RECIPES = "ivon: auto (AdamW's learning rate) or published (the IVON paper's settings, --lr 2)"


@dataclass(frozen=True)
class Settings(RunSettings):
    """A run. `make_settings` fills in what depends on method and optimizer."""

    model: str = setting(DEFAULT_MODEL, "folder or hub name of a Hugging Face model", group="input")
    data: str | None = setting(None, ".csv with a header or .jsonl (default: film-review sentences)", metavar="FILE")
    text: str = setting("text", "column with the text", metavar="COLUMN")
    label: str = setting("label", "column with the class", metavar="COLUMN")
    max_length: int = setting(48, "tokens a text is cut at", at_least(4), "N")

    method: str = setting(None, "see below (default: adalora; with adamw: lora)", tuple(METHODS), "NAME", "method")
    option: Sequence[str] = setting(
        (), "an argument of the method, e.g. links=2; may be repeated", metavar="NAME=VALUE"
    )
    optimizer: str = setting("ivon", "ivon, or adamw (with --method adalora: PEFT's AdaLoRA)", ("ivon", "adamw"))
    steps: int = setting(200, "optimizer steps", at_least(1), "N")
    batch_size: int = setting(32, "texts a step", at_least(1), "N")
    lr: float = setting(None, "peak learning rate (default: 0.003; adalora: 0.01)", positive)
    lr_warmup: int | float = setting(0.06, "linear warm-up of it", share_or_steps, "S")
    recipe: str = setting("auto", RECIPES, ("auto", "published"))
    temperature: float | None = setting(None, "ivon: 1 is Bayes' rule, less is less noise (default: 0.006)", positive)
    prior_std: float | None = setting(None, "ivon: largest noise of a weight (default: see VAdam)", positive)
    weight_decay: float | None = setting(None, WEIGHT_DECAY, not_negative)
    ess: float = setting(1e7, "ivon, published: effective sample size, larger is less noise", positive)
    hess_init: float = setting(1e-3, "ivon, published: initial Hessian", positive)
    clip_radius: float = setting(1e-3, "ivon, published: bound of an element of a step", positive)
    beta2: float = setting(0.99999, "ivon, published: decay of the Hessian", below_one)

    rank: int = setting(None, "rank of every layer (default: 8; where ranks are pruned 12)", at_least(1), "R", PRUNING)
    target_rank: int = setting(None, TARGET_RANK, at_least(1), "R")
    criterion: str = setting("snr_abs", "ivon: what makes a rank important", CRITERIA)
    warmup: int | float = setting(0.1, "before pruning", share_or_steps, "S")
    final: int | float = setting(0.4, "at the end, ranks fixed", share_or_steps, "S")
    interval: int | float = setting(0.05, "between prunings", share_or_steps, "S")

    out: str = setting("runs/finetune", "folder of the run", metavar="DIR", group="run")
    eval_limit: int = setting(300, "ivon: texts of each test set for the averages, 0 for all", at_least(0), "N")
    precision: str = setting("auto", "auto: bf16 where it is fast", ("auto", "fp32", "bf16"))
    save_every: int = setting(50, "steps between checkpoints", at_least(1), "N")
    log_every: int = setting(10, "steps between entries of the log", at_least(1), "N")

    @property
    def prunes(self) -> bool:
        """Whether ranks are pruned to ``target_rank``."""
        return self.method == "adalora" or (self.method, self.optimizer) == ("lora", "ivon")

    @property
    def resumable(self) -> bool:
        """PEFT saves an AdaLoRA model without the ranks that are masked for now, and its allocator not at all."""
        return (self.method, self.optimizer) != ("adalora", "adamw")


def make_settings(chosen: dict[str, Any]) -> Settings:
    """Settings with the values chosen by name, and defaults that suit the method. InputError if they do not fit."""
    s = Settings(**chosen)
    s = replace(s, method=s.method or ("adalora" if s.optimizer == "ivon" else "lora"))
    method, here = METHODS[s.method], f"--method {s.method} with --optimizer {s.optimizer}"
    method.arguments(s.option)
    rank = s.rank or (12 if s.prunes else method.rank)
    target = s.target_rank or (min(4, rank) if s.prunes else rank)
    lr = s.lr or (method.lr if s.recipe == "auto" or s.optimizer == "adamw" else PUBLISHED_LR.get(s.method, 1.0))
    if target > rank:
        raise InputError(f"--target-rank {target} is above --rank {rank}: lower it or raise --rank")
    if not s.prunes and target != rank:
        raise InputError(f"--target-rank {target} with {here}, which prunes otherwise or not at all: drop it")
    if s.method == "gelora" and s.rank:
        raise InputError(f"--rank {rank} with {here}, which finds the ranks itself: drop it")
    if (s.method, s.optimizer) == ("adalora", "adamw") and target == rank:
        raise InputError(f"--target-rank {rank} equals --rank: PEFT's AdaLoRA needs ranks to prune; lower it")
    warmup, final = as_steps(s.warmup, s.steps), as_steps(s.final, s.steps)
    if s.prunes and s.steps < warmup + final + 1:
        phases = f"--warmup {s.warmup} and --final {s.final} ({warmup} + {final} steps, and 1 or more to prune)"
        raise InputError(f"--steps {s.steps} is too few for {phases}: raise --steps, or lower one of them")
    for recipe, names in RECIPE_OPTIONS.items() if s.optimizer == "ivon" else ():
        unread = [f"--{name.replace('_', '-')}" for name in names if name in chosen]
        if recipe != s.recipe and unread:
            raise InputError(f"{unread[0]} is read with --recipe {recipe} only: add it, or drop the option")
    return replace(s, lr=lr) if s.method == "gelora" else replace(s, lr=lr, rank=rank, target_rank=target)


def read_settings(out: Path, chosen: Iterable[str]) -> tuple[Settings, str]:
    """The settings of the run in ``out`` and the fingerprint of its data, if nothing but --out was ``chosen``."""
    path = out / "settings.json"
    if not path.is_file():
        raise InputError(f"--resume: no run in {out}; give the --out of an interrupted run, or drop --resume")
    if others := [name.replace("_", "-") for name in chosen if name != "out"]:
        raise InputError(f"--resume: --{others[0]} is the run's own; drop the option, or --resume")
    with input_errors(f"--resume: {path} is damaged, or of another version; start again with --overwrite"):
        content = json.loads(path.read_text(encoding="utf-8"))
        settings, fingerprint = Settings(**{**content["settings"], "out": str(out)}), str(content["data"])
        if not settings.resumable:
            raise InputError("--resume: PEFT's AdaLoRA cannot be resumed, its checkpoints are not complete")
    return settings, fingerprint
