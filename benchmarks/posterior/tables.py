"""The tables of the report, as Markdown, from the rows of the ledgers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from benchmarks.posterior import averaging, oneshot, plan
from benchmarks.posterior.ledger import select
from benchmarks.posterior.minilm import TASKS
from benchmarks.posterior.statistics import Interval, interval, paired

Row = dict[str, str]
NAMES = {"ours": "ours", "adamw": "AdamW", "published": "IVON, published", "signature": "IVON, signature's defaults"}
METRICS = ("accuracy", "nll", "ece", "brier")
HEADS = {"accuracy": "accuracy", "nll": "NLL", "ece": "ECE", "brier": "Brier"}


def by_seed(rows: Iterable[Row], column: str) -> dict[int, float]:
    """The numbers of a column by seed, where there are any."""
    return {int(row["seed"]): float(row[column]) for row in rows if row[column] != ""}


def summary(rows: Iterable[Row], column: str) -> Interval | None:
    """Mean over seeds with its interval; None without rows."""
    values = list(by_seed(rows, column).values())
    return interval(values) if values else None


def truth_table(rows: Sequence[Row]) -> str:
    """Learned precision against the true Fisher information on the small beds."""
    lines = []
    for bed in plan.BEDS:
        for temperature in (1.0, 0.01):
            for method in ("ours", "signature"):
                options = plan.truth_options(method, bed, temperature)
                found = select(rows, bed=bed, method=method, options=options, steps=plan.TRUTH_STEPS)
                if not found:
                    continue
                cells = [bed, f"{temperature:g}", NAMES[method], str(len(found))]
                for truth in ("posterior", "training", "observed"):
                    names = ("spearman", "variance_ratio")
                    cells += [text(summary(found, f"{truth}_{name}"), 3) for name in names]
                cells.append(text(summary(found, "posterior_ceiling"), 3, interval=False))
                lines.append(cells)
    head = ["bed", "temperature", "method", "seeds", "Spearman, F under q", "variance ratio, F under q"]
    head += ["Spearman, training F", "variance ratio, training F"]
    return markdown([*head, "Spearman, observed labels", "variance ratio, observed labels", "ceiling"], lines)


def adapter_table(rows: Sequence[Row]) -> str:
    """The same on the adapter, and what else its posterior looks like."""
    names = ("spearman", "ceiling", "within", "within_ceiling", "variance_ratio", "scale")
    extra = ("sigma_1", "sigma_50", "sigma_99", "clipped", "step_rms", "snr_like_magnitude")
    lines = []
    for task in ("full", "over"):
        for method in ("ours", "published"):
            found = [row for row in claims(rows, task, method) if row["spearman"]]
            if found:
                values = [text(summary(found, name), 3, interval=name in names[:3:2]) for name in (*names, *extra)]
                lines.append([task, NAMES[method], str(len(found)), *values])
    head = ["task", "method", "seeds", "Spearman", "ceiling", "within tensors", "ceiling", "variance ratio"]
    head += ["sum h / sum F", "σ 1 %", "σ 50 %", "σ 99 %", "clipped", "RMS step / lr", "ranks: SNR like magnitude"]
    return markdown(head, lines)


def toy_basin_table(rows: Sequence[Row]) -> str:
    """Test NLL over learning rates on the small beds, and how wide the basin is."""
    lines = []
    for bed in plan.BEDS:
        for method in ("ours", "adamw", "signature"):
            lrs = plan.SIGNATURE_LRS if method == "signature" else plan.TOY_LRS
            found = [select(rows, bed=bed, method=method, lr=lr, options="", steps=plan.BASIN_STEPS) for lr in lrs]
            if all(found):
                accuracy = [mean_of(part, "accuracy") for part in found]
                nll = [mean_of(part, "nll") for part in found]
                cells = [f"{value:.3f}" for value in nll]
                lines.append([bed, NAMES[method], *cells, width(lrs, accuracy), f"{max(accuracy):.3f}"])
    head = [
        "bed",
        "method",
        *(f"{lr:g} ({other:g})" for lr, other in zip(plan.TOY_LRS, plan.SIGNATURE_LRS, strict=True)),
    ]
    return markdown([*head, "decades within 1 point", "best accuracy"], lines)


def toy_knob_table(rows: Sequence[Row]) -> str:
    """Accuracy and NLL over temperature and beta2 on the small beds."""
    lines = []
    for name, values in (("temperature", plan.TEMPERATURES), ("beta2", plan.BETA2S)):
        for value in values:
            cells = [f"{name} = {value:g}"]
            for bed in plan.BEDS:
                found = select(
                    rows, bed=bed, method="ours", lr=plan.TOY_LR, options=f"{name}={value:g}", steps=plan.BASIN_STEPS
                )
                for column in ("accuracy", "nll", "sampled_nll"):
                    cells.append(text(summary(found, column), 3, interval=False))
            lines.append(cells)
    for method in ("ours", "adamw"):
        cells = ["defaults" if method == "ours" else "AdamW"]
        for bed in plan.BEDS:
            found = select(rows, bed=bed, method=method, lr=plan.TOY_LR, options="", steps=plan.BASIN_STEPS)
            for column in ("accuracy", "nll", "sampled_nll"):
                cells.append(text(summary(found, column), 3, interval=False))
        lines.append(cells)
    head = [f"{bed}: {what}" for bed in plan.BEDS for what in ("accuracy", "NLL", "NLL, samples")]
    return markdown(["setting", *head], [cells for cells in lines if any(cells[1:])])


def basin_table(rows: Sequence[Row]) -> str:
    """Validation accuracy and NLL over learning rates on the MiniLM tasks, means over seeds."""
    lines = []
    columns = sorted({lr for _, _, lrs in plan.MINILM_BASINS for lr in lrs})
    for task, steps, lrs in plan.MINILM_BASINS:
        for method, options in (("ours", ""), ("ours", plan.FREE), ("adamw", ""), ("published", "")):
            found = basin_rows(rows, task, method, steps, lrs, options)
            if len(found) > 2:
                means = {
                    lr: [mean_of(part, f"validation_{metric}") for metric in ("accuracy", "nll")]
                    for lr, part in found.items()
                }
                cells = score_cells(means, columns)
                name = f"{NAMES[method]}, {options}" if options else NAMES[method]
                decades = width(list(found), [accuracy for accuracy, _ in means.values()])
                lines.append([task, str(steps or TASKS[task].steps), name, str(seeds_of(found)), *cells, decades])
    return markdown(
        ["task", "steps", "method", "seeds", *(f"{lr:g}" for lr in columns), "decades within 1 point"], lines
    )


def basin_rows(
    rows: Sequence[Row], task: str, method: str, steps: int, lrs: Sequence[float], options: str = ""
) -> dict[float, list[Row]]:
    """The runs at each learning rate, where there are any, on the validation sentences: seeds that all of them have.

    Args:
        options: of the optimizer; "" for the defaults, which stand for `plan.FREE` where the limit does nothing.
    """
    wanted: Mapping[str, object] = {"task": task, "method": method, "steps": steps, "split": "validation"}
    same = {lr: "" if options == plan.FREE and lr <= plan.LIMIT else options for lr in lrs}
    found = {lr: select(rows, lr=lr, options=same[lr], **wanted) for lr in lrs}
    found = {lr: part for lr, part in found.items() if part}
    common = set.intersection(*({row["seed"] for row in part} for part in found.values())) if found else set()
    return {lr: [row for row in part if row["seed"] in common] for lr, part in found.items()} if common else {}


def score_cells(scores: Mapping[float, Sequence[float]], lrs: Sequence[float]) -> list[str]:
    """A cell for each learning rate, with its scores, as in "0.820 / 0.431", or empty."""
    return [" / ".join(f"{x:.3f}" for x in scores[lr]) if lr in scores else "" for lr in lrs]


def seeds_of(found: Mapping[float, Sequence[Row]]) -> int:
    """Over how many seeds a basin's means are."""
    return len(next(iter(found.values())))


def variation_table(rows: Sequence[Row]) -> str:
    """Other temperatures and priors, on the validation sentences, seed 0."""
    lines = []
    for task in ("full", "over"):
        tried = select(rows, task=task, lr=plan.ADAMW_LR, split="validation", steps=0)
        tried = [row for row in tried if row["method"] != "published"]
        for row in sorted(tried, key=lambda row: (row["method"] == "adamw", row["options"])):
            name = NAMES[row["method"]] if not row["options"] else f"{NAMES[row['method']]}, {row['options']}"
            scores = [f"{float(row[f'validation_{metric}']):.4f}" for metric in METRICS]
            lines.append([task, name, row["seed"], *scores, f"{float(row['train_loss']):.3f}"])
    return markdown(["task", "method", "seed", *(HEADS[metric] for metric in METRICS), "train loss"], lines)


def score_table(rows: Sequence[Row], task: str) -> str:
    """Scores at the mean on the test and the shifted set."""
    lines = []
    for method, lr in contenders(task):
        found = claims(rows, task, method, lr)
        if found:
            cells = [NAMES[method], f"{lr:g}", str(len(found))]
            for name in ("test", "shifted"):
                cells += [text(summary(found, f"{name}_{metric}"), 4) for metric in METRICS]
            cells.append(text(summary(found, "train_loss"), 3, interval=False))
            lines.append(cells)
    heads = [f"{name} {HEADS[metric]}" for name in ("test", "shifted") for metric in METRICS]
    return markdown(["method", "lr", "seeds", *heads, "train loss"], lines)


def paired_table(rows: Sequence[Row], task: str) -> str:
    """Ours minus each other method, seed by seed."""
    ours = claims(rows, task, "ours", plan.ADAMW_LR)
    lines = []
    for method, lr in contenders(task)[1:]:
        theirs = claims(rows, task, method, lr)
        if set(by_seed(ours, "test_nll")) & set(by_seed(theirs, "test_nll")):
            cells = [f"{NAMES[method]} {lr:g}"]
            for name in ("test", "shifted"):
                for metric in METRICS:
                    column = f"{name}_{metric}"
                    cells.append(text(paired(by_seed(ours, column), by_seed(theirs, column)), 4, sign=True))
            lines.append(cells)
    heads = [f"{name} {HEADS[metric]}" for name in ("test", "shifted") for metric in METRICS]
    return markdown(["ours minus", *heads], lines)


def sampled_table(rows: Sequence[Row]) -> str:
    """Averaged over samples minus at the mean, on the same sentences, seed by seed."""
    lines = []
    for task in ("full", "over"):
        for method, lr in (("ours", plan.ADAMW_LR), ("published", plan.PUBLISHED_LR)):
            found = [row for row in claims(rows, task, method, lr) if row["test_sampled_nll"]]
            if found:
                cells = [task, NAMES[method], str(len(found))]
                for name in ("test", "shifted"):
                    for metric in METRICS:
                        sampled = by_seed(found, f"{name}_sampled_{metric}")
                        cells.append(text(paired(sampled, by_seed(found, f"{name}_part_{metric}")), 4, sign=True))
                lines.append(cells)
    heads = [f"{name} {HEADS[metric]}" for name in ("test", "shifted") for metric in METRICS]
    return markdown(["task", "method", "seeds", *heads], lines)


def averaging_table(averaged: Sequence[Row]) -> str:
    """Scores over the number of samples averaged, means over seeds, and the largest minus the mean, seed by seed."""
    lines = []
    for task in TASKS:
        found = {count: select(averaged, task=task, samples=count) for count in averaging.COUNTS}
        found = {count: part for count, part in found.items() if part}
        for name in averaging.SETS if found else ():
            for metric in METRICS:
                values = {count: by_seed(part, f"{name}_{metric}") for count, part in found.items()}
                cells = [f"{mean_of(found[n], f'{name}_{metric}'):.4f}" if n in found else "" for n in averaging.COUNTS]
                gain = text(paired(values[max(values)], values[0]), 4, sign=True)
                lines.append([task, str(len(values[0])), f"{name} {HEADS[metric]}", *cells, gain])
    head = ["task", "seeds", "", "at the mean", "1 sample", *(str(count) for count in averaging.COUNTS[2:])]
    return markdown([*head, "most samples minus mean"], lines)


def limit_table(rows: Sequence[Row]) -> str:
    """Validation accuracy and NLL of fresh adapters over the learning rate, a line per adapter and seed."""
    lrs = (*plan.LIMITS_LRS, plan.LIMITS_BEYOND)
    lines = []
    for key, made in by_adapter(rows).items():
        scores = {lr: (float(row["validation_accuracy"]), float(row["validation_nll"])) for lr, row in made.items()}
        name = [key.encoder, str(key.width), f"{key.rank} / {key.alpha}", f"{key.drawn:g}", str(key.seed)]
        lines.append([*name, *score_cells(scores, lrs)])
    head = ["encoder", "width", "rank / lora_alpha", "A times", "seed"]
    return markdown([*head, *(f"{lr:g}" for lr in lrs)], lines)


class AdapterKey(NamedTuple):
    """What the runs of one line of the limits have in common."""

    encoder: str
    width: int
    rank: int
    alpha: int
    drawn: float
    seed: int


def by_adapter(rows: Iterable[Row]) -> dict[AdapterKey, dict[float, Row]]:
    """Runs of the limits by learning rate, for every adapter and seed: narrow ones first."""
    found: dict[AdapterKey, dict[float, Row]] = {}
    for row in rows:
        width, rank, alpha, seed = (int(row[name]) for name in ("width", "rank", "alpha", "seed"))
        key = AdapterKey(row["encoder"], width, rank, alpha, float(row["drawn"]), seed)
        found.setdefault(key, {})[float(row["lr"])] = row
    return {key: dict(sorted(made.items())) for key, made in sorted(found.items(), key=lambda item: item[0][1:])}


def pruning_table(cuts: Sequence[Row]) -> str:
    """Rise of the test NLL when ranks are cut at one stroke, and SNR minus magnitude, seed by seed."""
    lines = []
    for method in ("ours", "published"):
        found = [row for row in cuts if row["method"] == method]
        whole = by_seed(select(found, criterion="all"), "test_nll")
        total = max((row["kept"] for row in select(found, criterion="all")), default="")
        for kept in sorted({int(row["kept"]) for row in found if row["criterion"] != "all"}, reverse=True):
            at = {name: by_seed(select(found, criterion=name, kept=kept), "test_nll") for name in oneshot.CRITERIA}
            cells = [NAMES[method], f"{kept} of {total}", str(len(at["snr_abs"]))]
            cells += [text(paired(values, whole), 3, sign=True) for values in at.values()]
            cells.append(text(paired(at["snr_abs"], at["magnitude"]), 3, sign=True))
            lines.append(cells)
    return markdown(["trained by", "ranks kept", "seeds", *oneshot.CRITERIA, "SNR minus magnitude"], lines)


def contenders(task: str) -> list[tuple[str, float]]:
    """Method and learning rate of the claims of a task, ours first."""
    adamw = [plan.ADAMW_LR] if task == "full" else list(plan.OVERFIT_LRS)
    return [("ours", plan.ADAMW_LR), *(("adamw", lr) for lr in adamw), ("published", plan.PUBLISHED_LR)]


def width(lrs: Sequence[float], accuracy: Sequence[float], points: float = 0.01) -> str:
    """Decades between the ends of the unbroken stretch of learning rates around the best that lie within ``points``."""
    low, high = basin(accuracy, points)
    return f"{math.log10(lrs[high] / lrs[low]):.1f} ({lrs[low]:g} to {lrs[high]:g})"


def basin(accuracy: Sequence[float], points: float) -> tuple[int, int]:
    """First and last position of the unbroken stretch around the maximum whose values lie within ``points`` of it."""
    best = max(range(len(accuracy)), key=lambda i: accuracy[i])
    inside: Callable[[int], bool] = lambda i: accuracy[i] >= accuracy[best] - points - 1e-12  # noqa: E731
    low = high = best
    while low > 0 and inside(low - 1):
        low -= 1
    while high + 1 < len(accuracy) and inside(high + 1):
        high += 1
    return low, high


def mean_of(rows: Iterable[Row], column: str) -> float:
    """Mean over seeds."""
    found = by_seed(rows, column)
    return sum(found.values()) / len(found)


def text(value: Interval | None, digits: int, *, sign: bool = False, interval: bool = True) -> str:
    """A cell: mean ± half width."""
    if value is None:
        return ""
    mean = f"{value.mean:{'+' if sign else ''}.{digits}f}"
    return f"{mean} ± {value.half:.{digits}f}" if interval and not math.isnan(value.half) else mean


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table; a note where there is nothing yet."""
    if not lines:
        return "(no runs yet)"
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def claims(rows: Sequence[Row], task: str, method: str, lr: float | None = None) -> list[Row]:
    """The test rows of a method with its defaults, at ``lr`` (None: any)."""
    wanted: Mapping[str, object] = {"task": task, "method": method, "split": "test", "options": "", "steps": 0}
    return select(rows, **wanted, **({} if lr is None else {"lr": lr}))
