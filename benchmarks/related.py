"""Compare the related methods of `ivon_lora.variants`, each with AdamW and with our optimizer, at equal final ranks.

    python -m benchmarks.related --runs 20    # the next runs that benchmarks/results/related.csv lacks
    python -m benchmarks.related --report     # related.md from related.csv; no training

Every arm (`rank_arms.ARMS`) tries three learning rates on the validation split (seed 0); the best one by NLL trains
seeds 1 to 3, which are tested.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch

from benchmarks import ledger
from benchmarks.data import Sentences, load_base, load_sentences
from benchmarks.rank_arms import ARMS, SPENT, Setup
from benchmarks.tables import markdown
from benchmarks.training import METRICS, predict, scores, train

STEPS, BATCH, TOKENS, FACTORS, SEEDS = 96, 8, 24, (0.3, 1.0, 3.0), (1, 2, 3)
SENTENCES = {"train": 512, "validation": 400, "test": 800}
NAMES = ["uniform adamw lora", "uniform ivon lora", "adalora adamw triplets", "snr_abs ivon triplets"]
NAMES += [f"{method} {optimizer} lora" for method in ("gelora", *SPENT) for optimizer in ("adamw", "ivon")]
HEAD = f"""\
# Related methods at equal final ranks

Written by `python -m benchmarks.related --report` from `related.csv`; commits {{commits}}.

{SENTENCES["train"]} rated film-review sentences cut at {TOKENS} tokens, all-MiniLM-L6-v2, LoRA on its 36 linear layers,
alpha / rank 2, {STEPS} steps of {BATCH} sentences, linear warm-up (6 %) and decay, fp32. Every arm is to end with 4
ranks a layer on average (144); what it ended with stands in the table (ranks that are zero do not count). Learning
rates: the best by NLL on {SENTENCES["validation"]} validation sentences (seed 0) of 0.3, 1 and 3 times
3e-3 (triplets: 1e-2). Means of seeds 1 to 3 on {{n}} test sentences, ± half of the 95 % interval
(Student's t over seeds); differences are paired: same sentences in the same order, same head.

adamw: the paper's defaults. ivon: `VAdam`, and what the posterior adds (`rank_arms.SPENT`). *uniform*: rank 4
everywhere; *cola*: two links of rank 2; *diffora*: rank 8 in half of the layers; *sora*: 4 gates a layer, of which the
penalty removes some (they start at size 1 and fall by at most lr a step); *xgblora*: six boosters of rank 1, each on
four of the six blocks.

"""


def run(
    key: Mapping[str, Any], data: Sentences, evaluated: Sentences, base: Any = None, **sizes: int
) -> dict[str, Any]:
    """Train an arm, evaluate it at the mean of its weights, and say what a step cost: one row.

    Args:
        key: method, seed, split, steps and lr.
        base: the classifier (default: MiniLM).
        sizes: further arguments of `Setup`.
    """
    torch.set_num_threads(1)
    base = load_base(seed=key["seed"]) if base is None else base
    setup = Setup(base, data, key["steps"], key["lr"], key["seed"], **sizes)
    arm = ARMS[key["method"]][0](setup)
    options: dict[str, Any] = {"steps": setup.steps, "batch_size": setup.batch_size, "seed": setup.seed}
    options |= {"after_step": arm.after_step, "own_loss": arm.own_loss}
    steps = list(train(arm.model, arm.optimizer, data, **options))
    found = scores(predict(arm.model, evaluated).softmax(-1), evaluated)
    ranks = arm.ranks()
    return {
        **key,
        "n": len(evaluated),
        **found,
        "train_loss": statistics.fmean(step.loss for step in steps[-25:]),
        "ranks": sum(ranks),
        "passes_cpu_ms": 1e3 * statistics.median(step.passes for step in steps),
        "optimizer_cpu_ms": 1e3 * statistics.fmean(step.optimizer for step in steps),  # pruners work in some steps only
        "ranks_by_layer": " ".join(map(str, ranks)),
    }


def keys(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """The runs of the study as far as ``rows`` tell: those that tune, then those whose learning rate they chose."""
    best = tuned(rows)
    runs = [(name, 0, "validation", factor * ARMS[name][1]) for factor in FACTORS for name in NAMES]
    runs += [(name, seed, "test", best[name]) for seed in SEEDS for name in NAMES if name in best]
    names = ("method", "seed", "split", "lr")
    return [{**dict(zip(names, run, strict=True)), "lr": float(f"{run[3]:.6g}"), "steps": STEPS} for run in runs]


def tuned(rows: pd.DataFrame) -> dict[str, float]:
    """Of the arms that have tried all learning rates the one with the least NLL on the validation split."""
    tried = rows[rows.split == "validation"].groupby("method") if len(rows) else ()
    return {str(name): float(g.lr[g.nll.idxmin()]) for name, g in tried if len(g) == len(FACTORS)}


def page(rows: pd.DataFrame) -> str:
    """The report in Markdown."""
    tests, lines = rows[(rows.split == "test") & (rows.lr == rows.method.map(tuned(rows)))], []
    differences = ledger.paired(tests, "nll", "method", NAMES[0])
    for name, group in ((name, tests[tests.method == name]) for name in NAMES):
        paired = ledger.show(differences[name], sign=True) if name in differences else ""
        facts = [f"{group.lr.max():.2g}", f"{group.ranks.mean():.0f}", *(ledger.show(group[m]) for m in METRICS)]
        lines.append([name, *facts, paired, f"{group.passes_cpu_ms.median():.0f}"])
    head = ["arm", "learning rate", "ranks", *METRICS, "NLL minus the first", "ms of passes"]
    return HEAD.format(n=tests.n.iloc[0], commits=", ".join(rows.commit.unique())) + markdown(head, lines) + "\n"


def main() -> int:
    """Run from the command line; returns the exit status."""

    def make(key: Mapping[str, Any]) -> list[dict[str, Any]]:
        data, evaluated = (load_sentences(split, SENTENCES[split], TOKENS) for split in ("train", key["split"]))
        return [run(key, data, evaluated, batch_size=BATCH)]

    return ledger.command("related", keys, make, lambda path: page(ledger.read(path)))


if __name__ == "__main__":
    sys.exit(main())
