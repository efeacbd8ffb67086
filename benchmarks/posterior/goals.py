"""The goals that were set before the runs, and what the runs say of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.posterior import averaging, plan, tables
from benchmarks.posterior.ledger import select
from benchmarks.posterior.minilm import TASKS
from benchmarks.posterior.statistics import Interval, paired
from benchmarks.posterior.tables import Row, basin, by_seed, claims, markdown, mean_of, summary, text


def goals_table(toy_rows: Sequence[Row], rows: Sequence[Row], averaged: Sequence[Row]) -> str:
    """One line per goal: bound, measurement, verdict."""
    lines: list[list[str]] = []
    for bed, least in (("logreg", 0.95), ("digits", 0.9)):
        for temperature in (1.0, 0.01):
            found = select(toy_rows, bed=bed, method="ours", options=plan.truth_options("ours", bed, temperature))
            for column, name, low, high in (
                ("posterior_spearman", "Spearman of precision and true Fisher", least, math.inf),
                ("posterior_variance_ratio", "median variance ratio", 0.7, 1.4),
            ):
                _add(lines, f"{bed}, T = {temperature:g}: {name}", low, high, summary(found, column))
    ours = {task: claims(rows, task, "ours", plan.ADAMW_LR) for task in ("full", "over")}
    published = claims(rows, "full", "published", plan.PUBLISHED_LR)
    theirs = summary(published, "spearman")
    if theirs is not None:
        name = "adapter: Spearman of precision and true Fisher, above published settings"
        bound = theirs.mean if math.isnan(theirs.half) else theirs.high
        _add(lines, name, bound, math.inf, summary(ours["full"], "spearman"))
    adamw = claims(rows, "full", "adamw", plan.ADAMW_LR)
    for column, low, high in (("accuracy", -0.003, math.inf), ("nll", -math.inf, 0.0), ("ece", -math.inf, 0.0)):
        name = f"full task: test {column}, ours minus AdamW"
        _add(lines, name, low, high, difference(ours["full"], adamw, f"test_{column}"), 4)
    for column in ("nll", "ece"):
        name = f"full task: test {column}, ours averaged over 8 samples minus AdamW"
        _add(lines, name, -math.inf, 0.0, _pairs(ours["full"], f"test_sampled_{column}", adamw, f"test_{column}"), 4)
    most = averaging.COUNTS[-1]
    many = {task: select(averaged, task=task, lr=plan.ADAMW_LR, samples=most) for task in TASKS}
    for column in ("nll", "ece"):
        name = f"full task: test {column}, ours averaged over {most} samples minus AdamW"
        _add(lines, name, -math.inf, 0.0, difference(many["full"], adamw, f"test_{column}"), 4)
    sampled = _pairs(ours["full"], "test_sampled_nll", ours["full"], "test_part_nll")
    _add(lines, "full task: NLL of 8 samples minus at the mean", -math.inf, 0.0, sampled, 4)
    best = min(
        (lr for lr in plan.OVERFIT_LRS if claims(rows, "over", "adamw", lr)),
        key=lambda lr: mean_of(claims(rows, "over", "adamw", lr), "test_nll"),
        default=None,
    )
    if best is not None:
        controls = claims(rows, "over", "adamw", best)
        for column, low, high in (("nll", -math.inf, 0.0), ("accuracy", 0.0, math.inf)):
            name = f"256 sentences: test {column}, ours minus AdamW at its best lr of those run, {best:g}"
            _add(lines, name, low, high, difference(ours["over"], controls, f"test_{column}"), 4)
            name = f"256 sentences: test {column}, ours averaged over 8 samples minus the same"
            few = _pairs(ours["over"], f"test_sampled_{column}", controls, f"test_{column}")
            _add(lines, name, low, high, few, 4)
            name = f"256 sentences: test {column}, ours averaged over {most} samples minus the same"
            _add(lines, name, low, high, difference(many["over"], controls, f"test_{column}"), 4)
    same = claims(rows, "over", "adamw", plan.ADAMW_LR)
    name = "256 sentences: test nll, ours minus AdamW at the same lr"
    _add(lines, name, -math.inf, 0.0, difference(ours["over"], same, "test_nll"), 4)
    _add(lines, "clipped entries, full task", -math.inf, 0.05, summary(ours["full"], "clipped"))
    for title, curve, seeds in _basins(toy_rows, rows):
        if len(curve) > 2:
            lrs, accuracies = zip(*curve, strict=True)
            low, high = basin(accuracies, 0.01)
            decades = Interval(math.log10(lrs[high] / lrs[low]), math.nan, seeds)
            _add(lines, f"{title}: decades of lr within 1 point of the best", 1.0, math.inf, decades, 1)
    return markdown(["goal", "bound", "measured", "verdict"], lines)


def verdict(low: float, high: float, value: Interval) -> str:
    """What an interval says of a bound: "met", "missed", or on which side the mean lies when it cannot tell."""
    if math.isnan(value.half):
        return f"{'met' if low <= value.mean <= high else 'not met'}, without an interval"
    half = value.half
    if low <= value.mean - half and value.mean + half <= high:
        return "met"
    if low <= value.mean <= high:
        return "met on average; the interval is wider"
    if value.mean + half < low or value.mean - half > high:
        return "missed"
    return "not met on average; the interval includes the bound"


def difference(ours: Sequence[Row], theirs: Sequence[Row], column: str) -> Interval | None:
    """Ours minus theirs over common seeds, if there are any."""
    return _pairs(ours, column, theirs, column)


def _pairs(ours: Sequence[Row], our_column: str, theirs: Sequence[Row], their_column: str) -> Interval | None:
    first, second = by_seed(ours, our_column), by_seed(theirs, their_column)
    return paired(first, second) if set(first) & set(second) else None


def _basins(toy_rows: Sequence[Row], rows: Sequence[Row]) -> list[tuple[str, list[tuple[float, float]], int]]:
    """Of each basin the title, the mean accuracy at each learning rate, and the number of seeds."""
    basins = []
    for bed in plan.BEDS:
        toy = {lr: select(toy_rows, bed=bed, method="ours", lr=lr, options="") for lr in plan.TOY_LRS}
        basins.append((bed, {lr: part for lr, part in toy.items() if part}, "accuracy"))
    for task, steps, lrs in plan.MINILM_BASINS:
        name = "full task" if task == "full" else "256 sentences"
        for options in ("", plan.FREE):
            title = f"{name}, {steps or TASKS[task].steps} steps{f', {options}' if options else ''}"
            found = tables.basin_rows(rows, task, "ours", steps, lrs, options)
            basins.append((title, found, "validation_accuracy"))
    return [
        (title, [(lr, mean_of(part, column)) for lr, part in found.items()], tables.seeds_of(found))
        for title, found, column in basins
        if found
    ]


def _add(lines: list[list[str]], name: str, low: float, high: float, value: Interval | None, digits: int = 3) -> None:
    if value is None:
        return
    if math.isinf(low):
        bound = f"at most {high:g}"
    elif math.isinf(high):
        bound = f"at least {low:.3g}"
    else:
        bound = f"{low:g} to {high:g}"
    lines.append(
        [name, bound, f"{text(value, digits)} ({value.n} seed{'s' if value.n > 1 else ''})", verdict(low, high, value)]
    )
