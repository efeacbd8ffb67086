"""Which runs are made, in the order of their worth: whatever is cut off at the end is missed least."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from benchmarks.posterior import averaging, limits, minilm, toys
from ivon_lora.finetune.methods import SCALING
from ivon_lora.finetune.settings import DEFAULT_MODEL

SEEDS = (1, 2, 3, 4, 5)
ADAMW_LR = 3e-3  # AdamW's best on the full task's validation sentences, and what our defaults are given on both tasks
OVERFIT_LRS = (5e-4, 1e-3, 3e-3)
BASIN_LRS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
LONG_STEPS, LONG_LRS = 445, (5.6e-4, 1e-3, 1.8e-3, 3e-3, 5.6e-3, 1e-2)  # two epochs of the full task
OVER_LRS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
#: task, steps (0 for the task's) and learning rates
MINILM_BASINS = (("full", 0, BASIN_LRS), ("full", LONG_STEPS, LONG_LRS), ("over", 0, OVER_LRS))
LONG_SEEDS = (0, 1, 2)
#: the defaults without the limit of the learning rate, which is `LIMIT` here: below it, the defaults
FREE, LIMIT = "lr_limit=None", 3.3e-3
LIMITS_STEPS, LIMITS_SEEDS, LIMITS_LRS = 200, (0, 1, 2), (2.3e-3, 3.3e-3, 4.6e-3, 6.5e-3, 9.2e-3)
#: rank, lora_alpha and multiple of A as drawn: as everywhere, and others, these with seed 0 and a learning rate more
LIMITS_USUAL = (minilm.RANK, SCALING * minilm.RANK, 1.0)
LIMITS_VARIATIONS = ((8, 16, 4.0), (8, 16, 0.25), (2, 2, 1.0), (8, 32, 1.0), (32, 32, 1.0), (32, 64, 1.0))
LIMITS_BEYOND = 1.3e-2
PUBLISHED_LR = 1e-3  # learning rate times clip radius
#: of the defaults, temperature=0.003, an empirical prior that starts at weight_decay=0.001, beta2=0.999 and one epoch
#: of noise_warmup, on validation sentences, with seed 0 (prior=fixed with seeds 1 and 2, too)
VARIATIONS = (
    *("", "temperature=0.001", "temperature=0.005", "temperature=0.01", "temperature=1e-06"),
    *("noise_warmup=0", "beta2=auto", "prior=fixed"),
)

BEDS = ("logreg", "digits")
TRUTH_STEPS, BASIN_STEPS = 1000, 500
TOY_LR = 1e-2
SIGNATURE_LR = {"logreg": 0.3, "digits": 3.0}  # its best of the basin's
TOY_LRS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
SIGNATURE_LRS = (1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0, 30.0, 100.0)
TEMPERATURES = (1.0, 0.1, 0.01, 1e-3, 1e-4)
BETA2S = (0.9, 0.99, 0.999, 0.9999, 0.99999)
BASIN_SEEDS = (1,)
TRUTH_BETA2 = 0.99999  # the curvature of the truth beds is a mean over all of their steps
TOY_WEIGHT_DECAY = 1e-3  # of the truth beds, the same for all: prior_std = sqrt(temperature / (examples 1e-3))


@dataclass(frozen=True)
class MiniLMStep:
    """A run and what is measured beside its scores."""

    run: minilm.Run
    samples: bool = False
    fisher: bool = False
    prune: bool = False


@dataclass(frozen=True)
class AveragingStep:
    """A trained adapter, whose samples are averaged in growing number."""

    run: averaging.Run


@dataclass(frozen=True)
class LimitStep:
    """An adapter at a learning rate that it may not bear."""

    run: limits.Run


@dataclass(frozen=True)
class ToyStep:
    """A run, and whether its posterior is compared with the true curvature."""

    run: toys.Run
    curvature: bool = False


def minilm_runs() -> list[MiniLMStep]:
    """The study on MiniLM: basins on the validation sentences with seed 0, claims on the test sets with seeds 1-5."""
    run = minilm.Run
    steps = [MiniLMStep(run("full", "adamw", lr, 0, "validation")) for lr in reversed(BASIN_LRS)]
    steps += [MiniLMStep(run("over", "adamw", lr, 0, "validation")) for lr in OVER_LRS]
    for seed in SEEDS:
        steps.append(MiniLMStep(run("full", "ours", ADAMW_LR, seed), samples=True, fisher=True, prune=True))
        steps.append(MiniLMStep(run("over", "ours", ADAMW_LR, seed), samples=True, fisher=seed <= 3))
        steps.append(MiniLMStep(run("full", "adamw", ADAMW_LR, seed)))
        steps += [MiniLMStep(run("over", "adamw", lr, seed)) for lr in OVERFIT_LRS]
        if seed <= 3:
            published = run("full", "published", PUBLISHED_LR, seed)
            steps.append(MiniLMStep(published, fisher=True))
            steps.append(MiniLMStep(run("over", "published", PUBLISHED_LR, seed), fisher=True))
    for seed in LONG_SEEDS:
        for lr in reversed(LONG_LRS):
            steps.append(MiniLMStep(run("full", "ours", lr, seed, "validation", "", LONG_STEPS)))
    for task, n_steps, lrs in MINILM_BASINS:
        methods = ("ours", "adamw", "published") if lrs == BASIN_LRS else ("ours", "adamw")
        for lr in reversed(lrs):
            steps += [MiniLMStep(run(task, method, lr, 0, "validation", "", n_steps)) for method in methods]
    for task in minilm.TASKS:
        steps += [MiniLMStep(run(task, "ours", ADAMW_LR, 0, "validation", options)) for options in VARIATIONS]
    for seed in (1, 2):
        for task in reversed(minilm.TASKS):
            both = ("", "prior=fixed")
            steps += [MiniLMStep(run(task, "ours", ADAMW_LR, seed, "validation", options)) for options in both]
    for task, n_steps, lrs in MINILM_BASINS:
        beyond = [lr for lr in reversed(lrs) if lr > LIMIT]
        steps += [MiniLMStep(run(task, "ours", lr, 0, "validation", FREE, n_steps)) for lr in beyond]
    return list(dict.fromkeys(steps))


def averaging_runs() -> list[AveragingStep]:
    """Our defaults on both tasks, seeds 1-5; 256 sentences, whose noise is larger, first."""
    return [AveragingStep(averaging.Run(task, ADAMW_LR, seed)) for task in ("over", "full") for seed in SEEDS]


def limit_runs() -> list[LimitStep]:
    """Our defaults without a limit: two encoders with three seeds, then other adapters on the narrow one."""
    encoders = (DEFAULT_MODEL, Path(limits.WIDE).name)
    keys = [(encoder, *LIMITS_USUAL, lr, seed) for seed in LIMITS_SEEDS for lr in LIMITS_LRS for encoder in encoders]
    lrs = (*LIMITS_LRS, LIMITS_BEYOND)
    keys += [(DEFAULT_MODEL, *variation, lr, LIMITS_SEEDS[0]) for variation in LIMITS_VARIATIONS for lr in lrs]
    return [LimitStep(limits.Run(*key, LIMITS_STEPS)) for key in keys]


def truth_options(method: str, bed: str, temperature: float) -> str:
    """The same posterior asked of both methods: temperature, the prior of `TOY_WEIGHT_DECAY`, h a mean over the run."""
    if method == "ours":
        prior_std = math.sqrt(temperature / (len(toys.load_bed(bed).x) * TOY_WEIGHT_DECAY))
        return f"temperature={temperature:g} prior_std={prior_std:.4g} beta2={TRUTH_BETA2:g}"
    return f"temperature={temperature:g} weight_decay={TOY_WEIGHT_DECAY:g}"


def toy_runs() -> list[ToyStep]:
    """Truth beds with 5 seeds; then basins over learning rate, temperature and beta2 with one."""
    steps = []
    for seed in SEEDS:
        for bed in BEDS:
            for temperature in (1.0, 0.01):
                for method, lr in (("ours", TOY_LR), ("signature", SIGNATURE_LR[bed])):
                    run = toys.Run(bed, method, lr, seed, truth_options(method, bed, temperature), TRUTH_STEPS)
                    steps.append(ToyStep(run, curvature=True))
    for seed in BASIN_SEEDS:
        for bed in BEDS:
            for method, lrs in (("ours", TOY_LRS), ("adamw", TOY_LRS), ("signature", SIGNATURE_LRS)):
                steps += [ToyStep(toys.Run(bed, method, lr, seed, "", BASIN_STEPS)) for lr in lrs]
            for name, values in (("temperature", TEMPERATURES), ("beta2", BETA2S)):
                options = [f"{name}={value:g}" for value in values]
                steps += [ToyStep(toys.Run(bed, "ours", TOY_LR, seed, text, BASIN_STEPS)) for text in options]
    return list(dict.fromkeys(steps))


def quick_toy_runs() -> list[ToyStep]:
    """One short run of each kind."""
    runs = [toys.Run("logreg", "adamw", TOY_LR, 1, "", 40)]
    for bed in BEDS:
        runs.append(toys.Run(bed, "ours", TOY_LR, 1, truth_options("ours", bed, 0.01), 40))
        runs.append(toys.Run(bed, "signature", SIGNATURE_LR[bed], 1, truth_options("signature", bed, 0.01), 40))
    return [ToyStep(run, curvature=run.bed == "logreg" and run.method != "adamw") for run in runs]


def quick_minilm_runs() -> list[MiniLMStep]:
    """Three short runs that measure everything."""
    runs = [minilm.Run("full", method, ADAMW_LR, 1, steps=4) for method in ("adamw", "published", "ours")]
    return [MiniLMStep(run, *[run.method != "adamw"] * 3) for run in runs]


def quick_averaging_runs() -> list[AveragingStep]:
    """One short run."""
    return [AveragingStep(averaging.Run("over", ADAMW_LR, 1, samples=2, steps=4))]


def quick_limit_runs() -> list[LimitStep]:
    """Two short runs, one with a larger A."""
    starts = (LIMITS_USUAL, (*LIMITS_USUAL[:2], 4.0))
    return [LimitStep(limits.Run(DEFAULT_MODEL, *start, LIMITS_LRS[0], 0, 2)) for start in starts]
