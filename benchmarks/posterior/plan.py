"""Which runs are made, in the order of their worth: whatever is cut off at the end is missed least."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.posterior.minilm import Run

SEEDS = (1, 2, 3, 4, 5)
ADAMW_LR = 3e-3  # AdamW's best on the full task's validation sentences, and what our defaults are given on both tasks
OVERFIT_LRS = (5e-4, 1e-3, 3e-3)
BASIN_LRS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
PUBLISHED_LR = 1e-3  # learning rate times clip radius


@dataclass(frozen=True)
class Step:
    """A run and what is measured beside its scores."""

    run: Run
    samples: bool = False
    fisher: bool = False
    prune: bool = False


def minilm_runs() -> list[Step]:
    """The study on MiniLM: basins on the validation sentences with seed 0, claims on the test sets with seeds 1-5."""
    steps = [Step(Run("full", "adamw", lr, 0, "validation")) for lr in (ADAMW_LR, 1e-3)]
    for seed in SEEDS:
        steps.append(Step(Run("full", "ours", ADAMW_LR, seed), samples=True, fisher=True, prune=True))
        steps.append(Step(Run("over", "ours", ADAMW_LR, seed), samples=True, fisher=True))
        steps.append(Step(Run("full", "adamw", ADAMW_LR, seed)))
        steps += [Step(Run("over", "adamw", lr, seed)) for lr in OVERFIT_LRS]
        if seed <= 3:
            steps.append(Step(Run("full", "published", PUBLISHED_LR, seed), samples=True, fisher=True, prune=True))
            steps.append(Step(Run("over", "published", PUBLISHED_LR, seed), fisher=True))
    for lr in BASIN_LRS:
        steps += [Step(Run("full", method, lr, 0, "validation")) for method in ("ours", "adamw", "published")]
    return list(dict.fromkeys(steps))
