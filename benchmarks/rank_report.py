"""What the study of ranks says: a page of tables and a picture, both made of the CSV file alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.posterior.statistics import Interval, interval, paired
from benchmarks.rank_methods import ARMS, CONTROLS, OURS, SEEDS
from benchmarks.rank_table import Row
from ivon_lora.finetune.text_table import text_table
from ivon_lora.plots.style import BLUE, GREY, ORANGE, new_figure, tidy

REFERENCES = ("uniform adamw lora", "snr_abs ivon triplets")  # what people have, and what we propose
MODULES = ("query", "key", "value", "attention output", "intermediate", "output")  # in this order in every layer
METRICS: dict[str, Callable[[Row], float]] = {
    "accuracy": lambda row: row.accuracy,
    "NLL": lambda row: row.nll,
    "ECE": lambda row: row.ece,
    "Brier": lambda row: row.brier,
}

HEAD = """\
# The same budget of ranks, spent in different ways

Written by `python -m benchmarks.ranks --report` from `ranks.csv`; `python -m benchmarks.ranks --runs N` makes the runs
that are missing there.

The task is that of `ivon-lora finetune`, made cheaper: rated film-review sentences cut at 32 tokens, all-MiniLM-L6-v2,
LoRA on its 36 linear layers, alpha / rank 2, {steps} steps of 32 sentences (less than half an epoch), linear warm-up
(6 %) and decay, {precision}, one thread. Every method ends with {ranks} ranks, 4 a layer on average. Methods that prune
start with 12 a layer, keep all for 10 % of the steps and freeze the mask for the last 40 %. AdamW has the learning rate
that was best for it on the validation split in earlier runs (LoRA 3e-3, AdaLoRA 1e-2; no weight decay); IVON is
`IVON.from_adamw` with AdamW's learning rate and nothing tuned. Metrics are at the mean of the weights on the first {n}
test sentences; on so many, the standard error of one accuracy is {error:.4f}, but all methods see the same ones.
"""

METHODS = """\
- *uniform*: rank 4 everywhere. *gelora*: ranks from the intrinsic dimensions of hidden states (GeLoRA), scaled to the
  same total. *adalora*: PEFT's AdaLoRA with its sensitivity scores and orthogonality penalty.
- *snr_abs, snr, magnitude, inverse_std, sensitivity*: `RankPruner` under each criterion, inside `IVON.step()`.
- *lora*: factors A and B; *triplets*: A, B and a gate E for each rank, as in AdaLoRA.
"""

CHOICES = """\
## Choices made on the validation split

Which layers `RankPruner` prunes in this study: plain LoRA or triplets, each at AdamW's learning rate for its form, with
the options named below the table.
"""
TIME = """\
## Time

Milliseconds of processor time a step on a shared machine: the median of forward and backward pass, and the mean of
everything else: drawing the sample, the step, scores and allocation. Other work on the machine lengthens them.
"""


def write_report(rows: Sequence[Row], path: Path) -> list[Path]:
    """Write the page and the picture beside ``path``, named after it; returns them.

    Raises:
        ValueError: there are no runs on the test split, or runs of one method that cannot be averaged.
    """
    test = [row for row in rows if row.split == "test"]
    if not test:
        raise ValueError(f"{path} has no runs on the test split: make some with --runs")
    page, picture = path.with_suffix(".md"), path.with_suffix(".png")
    page.write_text(page_text(rows), encoding="utf-8")
    dot_plot(test).savefig(picture, dpi=150)
    return [page, picture]


def page_text(rows: Sequence[Row]) -> str:
    """The page, in Markdown."""
    test = [row for row in rows if row.split == "test"]
    one = test[0]
    accuracy = statistics.fmean(row.accuracy for row in test)
    parts = [
        HEAD.format(
            steps=one.steps,
            precision=one.precision,
            ranks=one.ranks,
            n=one.n,
            error=(accuracy * (1 - accuracy) / one.n) ** 0.5,
        ),
        METHODS,
        options_text(test),
        "## Results\n\nMeans over seeds ± half of the 95 % interval (Student's t over seeds; none for one seed).\n",
        code(results_table(test)),
        "## Differences\n\nSeed by seed: the same sentences in the same order, the same head.\n",
        *(part for reference in REFERENCES for part in difference_parts(test, reference)),
        not_run(test),
        "## Where the ranks went\n\nMean rank over layers for every module, and over modules for every layer.\n",
        code(place_table(test)),
        TIME,
        code(time_table(test)),
    ]
    validation = [row for row in rows if row.split == "validation"]
    if validation:
        parts += [CHOICES, code(validation_table(validation)), options_text(validation)]
    parts.append("![Accuracy and negative log-likelihood of every run](ranks.png)\n")
    return "\n".join(parts)


def by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by method, the methods in the order of `ARMS`."""
    groups: dict[str, list[Row]] = {name: [] for name in ARMS}
    for row in rows:
        groups.setdefault(row.method, []).append(row)
    return {name: sorted(group, key=lambda row: row.seed) for name, group in groups.items() if group}


def options_text(rows: Sequence[Row]) -> str:
    """How the optimizers worked, beside the learning rate.

    Raises:
        ValueError: runs of one method had different ones.
    """
    found: dict[str, list[str]] = {}
    for name, group in by_method(rows).items():
        options = {row.options for row in group}
        if len(options) > 1:
            raise ValueError(
                f"{name} was run with {' and with '.join(sorted(options))}, which cannot be averaged: take the rows of "
                "one of them out of the file"
            )
        found.setdefault(options.pop(), []).append(name)
    lines = [f"- {', '.join(names)}:\n  `{text}`" for text, names in found.items()]
    return (
        "Optimizers, as their parameter groups say (the effective sample size `ess` includes the temperature):\n\n"
        + ("\n".join(lines) + "\n")
    )


def difference_parts(rows: Sequence[Row], reference: str) -> list[str]:
    """Table and finding against one method, or nothing without runs of it."""
    if reference not in by_method(rows):
        return []
    return [f"### To `{reference}`\n", code(difference_table(rows, reference)), finding(rows, reference)]


def results_table(rows: Sequence[Row]) -> str:
    """Every metric of every method."""
    lines = []
    for name, group in by_method(rows).items():
        cells = [show(interval([metric(row) for row in group])) for metric in METRICS.values()]
        lines.append([name, f"{len(group)}", *cells, f"{statistics.fmean(row.train_loss for row in group):.3f}"])
    return text_table(["method", "seeds", *METRICS, "training loss"], lines)


def difference_table(rows: Sequence[Row], reference: str) -> str:
    """Every metric of every method minus that of ``reference``, over the seeds that both have."""
    groups = by_method(rows)
    theirs = groups.get(reference, [])
    lines = []
    for name, group in groups.items():
        common = {row.seed for row in group} & {row.seed for row in theirs}
        if name == reference or not common:
            continue
        differences = [paired(values(group, metric), values(theirs, metric)) for metric in METRICS.values()]
        lines.append([name, f"{len(common)}", *(show(d, sign=True) for d in differences)])
    return text_table(["method", "seeds", *METRICS], lines)


def finding(rows: Sequence[Row], reference: str) -> str:
    """Which of these differences have an interval that leaves out zero, in words."""
    groups = by_method(rows)
    theirs = groups.get(reference, [])
    looked, found = 0, []
    for name, group in groups.items():
        if name == reference or len({row.seed for row in group} & {row.seed for row in theirs}) < 2:
            continue
        for metric, value in METRICS.items():
            difference = paired(values(group, value), values(theirs, value))
            looked += 1
            if abs(difference.mean) > difference.half:
                better = (difference.mean > 0) == (metric == "accuracy")
                found.append(f"{name}: {metric} {'better' if better else 'worse'} by {abs(difference.mean):.4f}")
    if not looked:
        return "No method has two seeds in common with the reference: nothing can be told apart.\n"
    told = "\n".join(f"- {line}" for line in found) or "- none"
    return (
        f"Differences whose 95 % interval leaves out zero, of {looked} (of so many, about {0.05 * looked:.1f} would by "
        f"chance alone):\n\n{told}\n"
    )


def not_run(rows: Sequence[Row]) -> str:
    """The runs of the plan that are not there, in words."""
    done = {(row.method, row.seed) for row in rows}
    missing = {arm.name: [str(seed) for seed in SEEDS if (arm.name, seed) not in done] for arm in (*CONTROLS, *OURS)}
    lines = [f"- {name}: seed {', '.join(seeds)}" for name, seeds in missing.items() if seeds]
    if not lines:
        return ""
    return "Planned and not run, so that nothing can be said about it:\n\n" + "\n".join(lines) + "\n"


def place_table(rows: Sequence[Row]) -> str:
    """Mean ranks by module and by layer."""
    lines = []
    layers = 0
    for name, group in by_method(rows).items():
        ranks = [[int(rank) for rank in row.ranks_by_layer.split()] for row in group]
        mean = [statistics.fmean(column) for column in zip(*ranks, strict=True)]
        width = len(MODULES)
        layers = len(mean) // width
        modules = [statistics.fmean(mean[j::width]) for j in range(width)]
        depths = [statistics.fmean(mean[i * width : (i + 1) * width]) for i in range(layers)]
        lines.append([name, *(f"{x:.1f}" for x in (*modules, *depths))])
    return text_table(["method", *MODULES, *(f"layer {i}" for i in range(layers))], lines)


def time_table(rows: Sequence[Row]) -> str:
    """What a step costs."""
    lines = []
    for name, group in by_method(rows).items():
        passes = statistics.median(row.passes_cpu_ms for row in group)
        optimizer = statistics.median(row.optimizer_cpu_ms for row in group)
        lines.append([name, f"{passes:.0f}", f"{optimizer:.1f}", f"{100 * optimizer / (passes + optimizer):.1f} %"])
    return text_table(["method", "passes", "optimizer", "its share"], lines)


def validation_table(rows: Sequence[Row]) -> str:
    """Every run on the validation split."""
    lines = [
        [row.method, row.lr, f"{row.seed}", f"{row.accuracy:.4f}", f"{row.nll:.4f}", f"{row.train_loss:.3f}"]
        for row in rows
    ]
    return text_table(["method", "lr", "seed", "accuracy", "NLL", "training loss"], lines)


def dot_plot(rows: Sequence[Row]) -> Any:
    """Accuracy and NLL of every run, with means and intervals; circles AdamW, squares IVON."""
    groups = by_method(rows)
    figure = new_figure(8.6, 1.4 + 0.36 * len(groups))
    panels = figure.subplots(1, 2, sharey=True)
    for panel, name in zip(panels, ("accuracy", "NLL"), strict=True):
        for y, (method, group) in enumerate(groups.items()):
            ours = ARMS[method].optimizer == "ivon" if method in ARMS else False
            colour, marker = (ORANGE, "s") if ours else (BLUE, "o")
            points = [METRICS[name](row) for row in group]
            panel.plot(points, [y - 0.25] * len(points), linestyle="none", marker="|", markersize=7, color=GREY)
            mean = interval(points)
            arm = mean.half if mean.n > 1 else 0.0
            panel.errorbar(mean.mean, y, xerr=arm, marker=marker, color=colour, markersize=6, capsize=3)
        panel.set_xlabel(f"test {name}, {'more' if name == 'accuracy' else 'less'} is better")
        tidy(panel, "x")
    panels[0].set_yticks(range(len(groups)), list(groups))
    panels[0].set_ylim(len(groups) - 0.5, -0.6)
    spread = [x for row in rows for x in [METRICS["accuracy"](row)]]
    panels[0].set_xlim(min(spread) - 0.02, max(spread) + 0.02)
    losses = [METRICS["NLL"](row) for row in rows]
    panels[1].set_xlim(min(losses) - 0.02, max(losses) + 0.02)
    figure.suptitle(
        "grey: seeds; marker and arms: mean, 95 % interval over seeds (cut at the frame); circle AdamW, square IVON",
        fontsize=9,
        x=0.02,
        ha="left",
    )
    return figure


def values(rows: Sequence[Row], metric: Callable[[Row], float]) -> Mapping[int, float]:
    """The metric by seed."""
    return {row.seed: metric(row) for row in rows}


def show(value: Interval, sign: bool = False) -> str:
    """Mean ± half width."""
    mean = f"{value.mean:+.4f}" if sign else f"{value.mean:.4f}"
    return mean if value.n < 2 else f"{mean} ± {value.half:.4f}"


def code(text: str) -> str:
    """A block of fixed width."""
    return f"```\n{text}\n```\n"
