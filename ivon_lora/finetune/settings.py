"""Every setting of a run, its default, and what is allowed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from ivon_lora.finetune.errors import InputError

__all__ = ["CRITERIA", "DEFAULT_MODEL", "FREE_ON_RESUME", "OPTIMIZERS", "Settings", "as_steps", "make_settings"]

DEFAULT_MODEL = "all-MiniLM-L6-v2"
OPTIMIZERS = ("ivon", "adamw", "adalora")
CRITERIA = ("snr_abs", "snr", "magnitude", "inverse_std", "sensitivity")
LAYERS = ("adalora", "lora")
PRECISIONS = ("auto", "fp32", "bf16")
DEVICES = ("auto", "cpu", "cuda")

# What --resume may change: nothing that the trained numbers depend on.
FREE_ON_RESUME = ("out", "threads", "samples", "eval_limit", "save_every", "log_every")

RECIPES = ("auto", "published")
#: settings that only one recipe of ivon reads
RECIPE_SETTINGS = {
    "auto": ("temperature",),
    "published": ("ess", "hess_init", "clip_radius", "beta2"),
}

# Chosen on the validation split of the default data, 200 steps. The published IVON's step is lr * clip_radius for most
# elements; by itself (--recipe auto) it is AdamW's.
DEFAULT_LR = {"ivon": 3e-3, "adamw": 3e-3, "adalora": 1e-2}
GATED_LR = 1e-2  # of ivon with --layers adalora
PUBLISHED_LR = {"adalora": 2.0, "lora": 1.0}  # by --layers; 2 collapses to chance on plain LoRA
DEFAULT_RANK = {"ivon": 12, "adamw": 8, "adalora": 12}
DEFAULT_TARGET_RANK = 4


@dataclass(frozen=True)
class Settings:
    """A run. Make one with `make_settings`, which fills in what depends on the optimizer and checks."""

    model: str = DEFAULT_MODEL
    data: str | None = None
    text: str = "text"
    label: str = "label"
    optimizer: str = "ivon"
    rank: int = DEFAULT_RANK["ivon"]
    target_rank: int = DEFAULT_TARGET_RANK
    layers: str = "adalora"
    criterion: str = "snr_abs"
    warmup: int | float = 0.1
    final: int | float = 0.4
    interval: int | float = 0.05
    steps: int = 200
    batch_size: int = 32
    max_length: int = 48
    lr: float = GATED_LR
    lr_warmup: int | float = 0.06
    recipe: str = "auto"
    temperature: float | None = None
    ess: float = 1e7
    hess_init: float = 1e-3
    clip_radius: float = 1e-3
    beta2: float = 0.99999
    weight_decay: float | None = None
    seed: int = 0
    samples: int = 8
    eval_limit: int = 300
    precision: str = "auto"
    device: str = "auto"
    threads: int | None = None
    save_every: int = 50
    log_every: int = 10
    out: str = "runs/finetune"

    def check(self) -> None:
        """Raise InputError, naming option, value, bound and cure, for the first setting that cannot work."""
        _one_of("--criterion", self.criterion, CRITERIA)
        _one_of("--layers", self.layers, LAYERS)
        _one_of("--recipe", self.recipe, RECIPES)
        _one_of("--precision", self.precision, PRECISIONS)
        _one_of("--device", self.device, DEVICES)
        for name in ("steps", "batch_size", "samples", "log_every", "save_every"):
            _at_least(name, getattr(self, name), 1)
        _at_least("max_length", self.max_length, 4)
        _at_least("eval_limit", self.eval_limit, 0)
        _at_least("seed", self.seed, 0)
        if self.threads is not None:
            _at_least("threads", self.threads, 1)
        for name in ("lr", "ess", "hess_init", "clip_radius", "temperature"):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))
        if not 0 <= self.beta2 < 1:
            raise InputError(f"--beta2 {self.beta2} is outside [0, 1): give for example 0.99999")
        if self.weight_decay is not None and not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise InputError(f"--weight-decay {self.weight_decay} must be 0 or a positive number")
        for name in ("warmup", "final", "lr_warmup"):
            _share_or_steps(name, getattr(self, name))
        _share_or_steps("interval", self.interval)
        self._check_ranks()
        if self.optimizer != "adamw":
            self._check_schedule()

    def _check_ranks(self) -> None:
        rank, target = self.rank, self.target_rank
        _at_least("rank", rank, 1)
        _at_least("target_rank", target, 1)
        if target > rank:
            raise InputError(f"--target-rank {target} is above --rank {rank}: lower it or raise --rank")
        if self.optimizer == "adamw" and target != rank:
            raise InputError(f"--target-rank {target} with --optimizer adamw: it never prunes; drop it or use ivon")
        if self.optimizer == "adalora" and target == rank:
            raise InputError(f"--target-rank {target} equals --rank: PEFT's AdaLoRA needs ranks to prune; lower it")

    def _check_schedule(self) -> None:
        warmup, final = as_steps(self.warmup, self.steps), as_steps(self.final, self.steps)
        if self.steps < warmup + final + 1:
            phases = (
                f"--warmup {self.warmup} and --final {self.final} ({warmup} + {final} steps, and 1 or more to prune)"
            )
            raise InputError(f"--steps {self.steps} is too few for {phases}: raise --steps, or lower one of them")

    def as_dict(self) -> dict[str, Any]:
        """Plain values by name."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Settings:
        """The inverse of `as_dict`; unknown names (of another version) raise InputError."""
        unknown = set(values) - {field.name for field in fields(Settings)}
        if unknown:
            raise InputError(f"unknown settings {sorted(unknown)}: the run is of another version of ivon-lora")
        return Settings(**values)


def make_settings(chosen: dict[str, Any]) -> Settings:
    """Settings with the values chosen by name, and defaults that suit the optimizer. InputError as `Settings.check`."""
    optimizer = chosen.get("optimizer", Settings.optimizer)
    _one_of("--optimizer", optimizer, OPTIMIZERS)
    rank = chosen.get("rank", DEFAULT_RANK[optimizer])
    target = rank if optimizer == "adamw" else min(DEFAULT_TARGET_RANK, max(rank, 1))
    layers, recipe = chosen.get("layers", Settings.layers), chosen.get("recipe", Settings.recipe)
    _one_of("--layers", layers, LAYERS)
    _one_of("--recipe", recipe, RECIPES)
    lr = DEFAULT_LR[optimizer]
    if optimizer == "ivon":
        lr = PUBLISHED_LR[layers] if recipe == "published" else {"lora": lr, "adalora": GATED_LR}[layers]
    defaults: dict[str, Any] = {"rank": rank, "target_rank": target, "lr": lr}
    if not (optimizer == "ivon" and recipe == "auto"):  # there it follows from the number of examples
        defaults["weight_decay"] = 0.0
    settings = Settings(**{**defaults, **chosen})
    settings.check()
    for other, names in RECIPE_SETTINGS.items():
        unread = [name for name in names if name in chosen]
        if optimizer == "ivon" and other != recipe and unread:
            raise InputError(f"{option(unread[0])} is read with --recipe {other} only: add it, or drop the option")
    return settings


def as_steps(value: int | float, steps: int) -> int:
    """Steps for an int; for a float, that share of ``steps``, rounded."""
    return value if isinstance(value, int) else round(value * steps)


def option(name: str) -> str:
    """The command-line spelling of a setting."""
    return "--" + name.replace("_", "-")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name} {value!r} is unknown: choose {', '.join(allowed)}")


def _at_least(name: str, value: int, bound: int) -> None:
    if value < bound:
        raise InputError(f"{option(name)} {value} is too small: give {bound} or more")


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"{option(name)} {value} must be a positive number")


def _share_or_steps(name: str, value: int | float) -> None:
    if value < 0 or (isinstance(value, float) and not value <= 1):
        raise InputError(f"{option(name)} {value} must be a number of steps (20) or a share of them (0.1)")
