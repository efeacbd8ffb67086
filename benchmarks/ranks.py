"""Compare ways to spend a budget of LoRA ranks: real sentences, one final budget, several seeds.

    python -m benchmarks.ranks --runs 2          # the next two runs that benchmarks/results/ranks.csv lacks
    python -m benchmarks.ranks --report          # ranks.md and ranks.png from ranks.csv; no training
    python -m benchmarks.ranks --quick           # two short runs into a scratch folder: does it work?

Rated film-review sentences of at most 32 tokens, all-MiniLM-L6-v2, 100 steps of 32 sentences, fp32, one thread. Every
arm (`rank_arms.ARMS`) ends with 4 ranks a layer on average (144 of 36 layers); those that prune start with 12. A run
appends a row; a row that is there is not made again.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks import ledger
from benchmarks.data import Sentences, load_base, load_sentences
from benchmarks.machine import RESULTS
from benchmarks.rank_arms import ARMS, Setup
from benchmarks.training import METRICS, predict, scores, train

STEPS, SEEDS, EVALUATED = 100, (1, 2, 3), 1000
REFERENCES = ("uniform adamw lora", "snr_abs ivon triplets")  # what people have, and what we propose
MODULES = ("query", "key", "value", "attention output", "intermediate", "output")  # in this order in every layer


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ranks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two short runs into a scratch folder")
    parser.add_argument("--runs", type=int, default=1, help="how many of the missing runs to make (default: 1)")
    parser.add_argument("--report", action="store_true", help="write the report on the runs that are done")
    parser.add_argument("--arms", help="names separated by commas (default: all)")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="separated by commas (default: %(default)s)")
    parser.add_argument("--lr", type=float, help="another learning rate than the arm's own")
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="what is evaluated")
    parser.add_argument("--out", type=Path, default=RESULTS / "ranks.csv", help="CSV file (default: in results/)")
    options = parser.parse_args(argv)
    if options.quick:
        return _quick()
    if options.report:
        return _report(options.out)
    names = options.arms.split(",") if options.arms else list(ARMS)
    unknown = [name for name in names if name not in ARMS]
    if unknown:
        parser.error(f"--arms: there is no {', '.join(unknown)}; there are {', '.join(ARMS)}")
    keys = [  # seed by seed, so that arms can be compared whenever the study is stopped
        {"method": name, "seed": int(seed), "split": options.split, "steps": STEPS, "lr": options.lr or ARMS[name][1]}
        for seed in options.seeds.split(",")
        for name in names
    ]
    ledger.resume(
        options.out,
        keys,
        lambda key: [run(key, load_sentences("train"), load_sentences(options.split, EVALUATED))],
        options.runs,
    )
    return 0


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
    steps = list(
        train(
            arm.model,
            arm.optimizer,
            data,
            steps=setup.steps,
            batch_size=setup.batch_size,
            seed=setup.seed,
            after_step=arm.after_step,
            own_loss=arm.own_loss,
        )
    )
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


HEAD = """\
# The same budget of ranks, spent in different ways

Written by `python -m benchmarks.ranks --report` from `ranks.csv`; commits {commits}.

The task is that of `ivon-lora finetune`, made cheaper: rated film-review sentences cut at 32 tokens, all-MiniLM-L6-v2,
LoRA on its 36 linear layers, alpha / rank 2, {steps} steps of 32 sentences (less than half an epoch), linear warm-up
(6 %) and decay, fp32, one thread. Every arm ends with {ranks} ranks. Arms that prune start with 12 a layer, keep all
for 10 % of the steps and freeze the mask for the last 40 %. AdamW has the learning rate that was best for it on the
validation split in earlier runs (LoRA 3e-3, AdaLoRA 1e-2; no weight decay); "ivon" is `VAdam`, now `VAdam`,
with AdamW's learning rate and nothing tuned. Metrics are at the mean of the weights on the first {n} test sentences; on
so many, the standard error of one accuracy is {error:.4f}, but all arms see the same ones. ± is half of the 95 %
interval (Student's t over seeds); differences are paired: same sentences in the same order, same head.

- *uniform*: rank 4 everywhere. *gelora*: ranks from the intrinsic dimensions of hidden states (GeLoRA), scaled to the
  same total. *adalora*: PEFT's AdaLoRA with its sensitivity scores and orthogonality penalty.
- *snr_abs, snr, magnitude, inverse_std, sensitivity*: `RankPruner` under each criterion, inside the optimizer's step.
- *lora*: factors A and B; *triplets*: A, B and a gate E for each rank, as in AdaLoRA.
"""


def planned(rows: pd.DataFrame) -> pd.DataFrame:
    """The runs of `ARMS` at their own learning rates on the test split, arm by arm."""
    names, lrs = list(ARMS), {name: lr for name, (_, lr) in ARMS.items()}
    rows = rows[(rows.split == "test") & (rows.lr == rows.method.map(lrs))]
    return rows.sort_values(["method", "seed"], key=lambda x: x.map(names.index) if x.name == "method" else x)


def page(rows: pd.DataFrame) -> str:
    """The report in Markdown."""
    accuracy, n = rows.accuracy.mean(), int(rows.n.iloc[0])
    parts = [
        HEAD.format(
            commits=", ".join(rows.commit.unique()),
            steps=rows.steps.iloc[0],
            ranks=" or ".join(map(str, rows.ranks.unique())),
            n=n,
            error=(accuracy * (1 - accuracy) / n) ** 0.5,
        ),
        "## Results\n",
        results_table(rows),
    ]
    for reference in REFERENCES:
        if reference in set(rows.method):
            parts += [f"\n## Differences to `{reference}`\n", difference_table(rows, reference)]
    parts += [
        "\n## Where the ranks went\n\nMean over layers for every module, and over modules for every layer.\n",
        place_table(rows),
        "\n## Time\n\nMilliseconds of processor time a step: median of the passes, mean of optimizer and pruner.\n",
        time_table(rows),
        "\n![Accuracy and negative log-likelihood of every run](ranks.png)",
    ]
    return "\n".join(parts) + "\n"


def results_table(rows: pd.DataFrame) -> str:
    """Every metric of every arm."""
    lines = [
        [name, len(group), *(ledger.show(group[metric]) for metric in METRICS), f"{group.train_loss.mean():.3f}"]
        for name, group in rows.groupby("method", sort=False)
    ]
    return ledger.markdown(["arm", "seeds", *METRICS, "training loss"], lines)


def difference_table(rows: pd.DataFrame, reference: str) -> str:
    """Every metric of every arm minus that of ``reference``, over the seeds that both have."""
    by_metric = {metric: ledger.paired(rows, metric, "method", reference) for metric in METRICS}
    lines = [
        [name, len(by_metric["nll"][name]), *(ledger.show(found[name], sign=True) for found in by_metric.values())]
        for name in by_metric["nll"]
        if len(by_metric["nll"][name])
    ]
    return ledger.markdown(["arm", "seeds", *METRICS], lines)


def place_table(rows: pd.DataFrame) -> str:
    """Mean ranks by module and by layer."""
    kept = rows.ranks_by_layer.str.split(expand=True).astype(float).groupby(rows.method, sort=False).mean()
    modules = kept.T.groupby(lambda i: i % len(MODULES)).mean().T
    layers = kept.T.groupby(lambda i: i // len(MODULES)).mean().T
    cells = pd.concat([modules, layers], axis=1).map("{:.1f}".format)
    head = ["arm", *MODULES, *(f"layer {i}" for i in layers)]
    return ledger.markdown(head, [[name, *line] for name, line in zip(cells.index, cells.values, strict=True)])


def time_table(rows: pd.DataFrame) -> str:
    """What a step costs."""
    cost = rows.groupby("method", sort=False)[["passes_cpu_ms", "optimizer_cpu_ms"]].median()
    lines = [(name, f"{a:.0f}", f"{b:.1f}", f"{100 * b / (a + b):.1f} %") for name, a, b in cost.itertuples()]
    return ledger.markdown(["arm", "passes", "optimizer", "its share"], lines)


def picture(rows: pd.DataFrame) -> Any:
    """Accuracy and NLL of every run, with means and intervals; circles AdamW, squares ours."""
    from matplotlib.figure import Figure

    groups = list(rows.groupby("method", sort=False))
    figure = Figure(figsize=(8.6, 1.4 + 0.36 * len(groups)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, metric in zip(panels, ("accuracy", "nll"), strict=True):
        for y, (name, group) in enumerate(groups):
            colour, marker = ("#D55E00", "s") if " ivon " in name else ("#0072B2", "o")
            mean, half = ledger.interval(group[metric])
            panel.plot(group[metric], [y - 0.25] * len(group), "|", markersize=7, color="#6E6E6E")
            panel.errorbar(mean, y, xerr=half, marker=marker, color=colour, markersize=6, capsize=3)
        panel.set_xlim(rows[metric].min() - 0.02, rows[metric].max() + 0.02)
        panel.set_xlabel("test accuracy, more is better" if metric == "accuracy" else "test NLL, less is better")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="x", color="#E5E5E5")
    panels[0].set_yticks(range(len(groups)), [name for name, _ in groups])
    panels[0].set_ylim(len(groups) - 0.5, -0.6)
    title = "grey: seeds; marker and whiskers: mean, 95 % interval (cut at the frame); circle AdamW, square ours"
    figure.suptitle(title, fontsize=9, x=0.02, ha="left")
    return figure


def _report(path: Path) -> int:
    rows = planned(ledger.read(path))
    path.with_suffix(".md").write_text(page(rows), encoding="utf-8")
    picture(rows).savefig(path.with_suffix(".png"), dpi=150)
    print(f"written: {path.with_suffix('.md')}, {path.with_suffix('.png')}")
    return 0


def _quick() -> int:
    """Two runs of a few steps and the report on them, in a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ranks.csv"
        for name in REFERENCES:
            key = {"method": name, "seed": 1, "split": "test", "steps": 6, "lr": ARMS[name][1]}
            ledger.append(path, [run(key, load_sentences("train", 64), load_sentences("test", 50))])
        _report(path)
        print(path.with_suffix(".md").read_text(encoding="utf-8"))
    print("it works; the numbers mean nothing")
    return 0


if __name__ == "__main__":
    sys.exit(main())
