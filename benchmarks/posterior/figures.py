"""The pictures of the report, in colours that colour-blind readers can tell apart and with markers for print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.posterior import averaging, limits, minilm, oneshot, plan, toys
from benchmarks.posterior.ledger import select
from benchmarks.posterior.statistics import Interval, interval, paired
from benchmarks.posterior.tables import NAMES, Row, basin_rows, by_adapter, by_seed, contenders, summary
from ivon_lora.optim.lr_limit import limit_of

INK = "#222222"


@dataclass(frozen=True)
class Style:
    """How a series looks (colours of Okabe and Ito)."""

    color: str
    marker: str
    line: str = "-"


STYLES = {
    "ours": Style("#0072B2", "o"),
    "free": Style("#009E73", "v", "-."),
    "adamw": Style("#E69F00", "s", "--"),
    "signature": Style("#555555", "^", ":"),
    "published": Style("#CC79A7", "D", "-."),
    "snr_abs": Style("#0072B2", "o"),
    "magnitude": Style("#E69F00", "s", "--"),
    "inverse_std": Style("#CC79A7", "D", "-."),
    "random": Style("#555555", "^", ":"),
    "test": Style("#0072B2", "o"),
    "shifted": Style("#E69F00", "s", "--"),
}
CRITERION_NAMES = {"snr_abs": "SNR", "magnitude": "magnitude", "inverse_std": "1 / sigma", "random": "random"}


def write(folder: Path) -> list[Path]:
    """Write every picture for which there are rows."""
    toy_rows, rows = toys.ledger(folder).rows(), minilm.ledger(folder).rows()
    cuts, averaged = oneshot.ledger(folder).rows(), averaging.ledger(folder).rows()
    written = []
    for name, figure in (
        ("truth", truth_figure(toy_rows, rows)),
        ("basins", basin_figure(toy_rows, rows)),
        ("limits", limit_figure(limits.ledger(folder).rows())),
        ("calibration", calibration_figure(rows)),
        ("samples", averaging_figure(averaged)),
        ("pruning", pruning_figure(cuts)),
    ):
        if figure is not None:
            path = folder / f"posterior_{name}.png"
            figure.savefig(path, dpi=150, metadata={"Software": None})
            written.append(path)
    return written


def truth_figure(toy_rows: Sequence[Row], rows: Sequence[Row]) -> Any | None:
    """Rank correlation and variance ratio of the learned posterior with the true curvature, bed by bed."""
    beds: list[tuple[str, dict[str, list[Row]], str]] = []
    for bed in plan.BEDS:
        for temperature in (1.0, 0.01):
            found = {
                method: select(toy_rows, bed=bed, method=method, options=plan.truth_options(method, bed, temperature))
                for method in ("ours", "signature")
            }
            beds.append((f"{'logistic' if bed == 'logreg' else 'MLP'}\nT = {temperature:g}", found, "posterior_"))
    for task in ("full", "over"):
        found = {
            method: [row for row in select(rows, task=task, method=method, options="", split="test") if row["spearman"]]
            for method in ("ours", "published")
        }
        beds.append((f"adapter\n{task}", found, ""))
    beds = [(name, _measured(series, f"{prefix}spearman"), prefix) for name, series, prefix in beds]
    beds = [bed for bed in beds if bed[1]]
    if not beds:
        return None
    figure, (left, right) = _figure(2, width=9.5)
    for at, (_, series, prefix) in enumerate(beds):
        ceilings = [summary(rows_of, f"{prefix}ceiling") for rows_of in series.values()]
        height = max(ceiling.mean for ceiling in ceilings if ceiling is not None)
        left.plot([at - 0.35, at + 0.35], [height, height], color=INK, lw=1.2, label="ceiling" if at == 0 else None)
        for offset, (method, part) in zip((-0.12, 0.12), series.items(), strict=False):
            _point(left, at + offset, summary(part, f"{prefix}spearman"), method)
            _point(right, at + offset, summary(part, f"{prefix}variance_ratio"), method)
    right.axhspan(0.7, 1.4, color="#DDDDDD", zorder=0, label="0.7 to 1.4")
    right.set_yscale("log")
    right.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_minor_formatter("")
    left.set_ylabel("Spearman: learned precision, true Fisher")
    right.set_ylabel("learned / true variance, median")
    for axes in (left, right):
        axes.set_xticks(range(len(beds)), [name for name, _, _ in beds], fontsize=8)
        axes.set_xlim(-0.6, len(beds) - 0.4)
    left.set_ylim(-0.1, 1.05)
    _legend(left)
    _legend(right)
    return figure


def basin_figure(toy_rows: Sequence[Row], rows: Sequence[Row]) -> Any | None:
    """Accuracy over the learning rate."""
    panels: list[tuple[str, dict[str, list[tuple[float, Interval]]]]] = []
    for bed in plan.BEDS:
        series: dict[str, list[tuple[float, Interval]]] = {}
        for method in ("ours", "adamw", "signature"):
            lrs = plan.SIGNATURE_LRS if method == "signature" else plan.TOY_LRS
            for lr in lrs:
                found = select(toy_rows, bed=bed, method=method, lr=lr, options="", steps=plan.BASIN_STEPS)
                if found:
                    series.setdefault(method, []).append((lr, interval(list(by_seed(found, "accuracy").values()))))
        panels.append(("logistic regression" if bed == "logreg" else "MLP on digits", series))
    for task, steps, rates in plan.MINILM_BASINS:
        series = {}
        for name, method, options in (
            ("ours", "ours", ""),
            ("free", "ours", plan.FREE),
            ("adamw", "adamw", ""),
            ("published", "published", ""),
        ):
            known = basin_rows(rows, task, method, steps, rates, options)
            if len(known) > 2:
                series[name] = [
                    (lr, interval(list(by_seed(part, "validation_accuracy").values()))) for lr, part in known.items()
                ]
        title = f"MiniLM, {task}, {steps or minilm.TASKS[task].steps} steps"
        panels.append((title, series))
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        return None
    figure, all_axes = _figure(len(panels), width=3.3 * len(panels))
    for axes, (title, lines) in zip(all_axes, panels, strict=True):
        for method, points in lines.items():
            style = STYLES[method]
            axes.plot(
                [lr for lr, _ in points],
                [value.mean for _, value in points],
                color=style.color,
                marker=style.marker,
                ls=style.line,
                ms=5,
                label=f"ours, {plan.FREE}" if method == "free" else NAMES[method],
            )
        axes.set_xscale("log")
        axes.set_xlabel("learning rate")
        axes.set_title(title, fontsize=10)
        _legend(axes)
    all_axes[0].set_ylabel("accuracy")
    return figure


def limit_figure(rows: Sequence[Row]) -> Any | None:
    """Accuracy of fresh adapters over the learning rate: by width, by the scale of A, by rank and alpha."""
    if not rows:
        return None
    figure, all_axes = _figure(3, width=11)
    lrs = (*plan.LIMITS_LRS, plan.LIMITS_BEYOND)
    looks = list(STYLES.values())
    adapters = by_adapter(rows)
    rank, alpha, drawn = plan.LIMITS_USUAL
    usual = {"width": 384, "rank": rank, "alpha": alpha, "drawn": drawn, "seed": plan.LIMITS_SEEDS[0]}
    for axes, title, label, free in zip(
        all_axes,
        ("two encoders, three seeds", "scale at which A is drawn", "rank and lora_alpha"),
        ("width {0.width}", "A x {0.drawn:g}", "rank {0.rank}, alpha {0.alpha}"),
        ({"width", "seed"}, {"drawn"}, {"rank", "alpha"}),
        strict=True,
    ):
        fixed = usual.keys() - free
        found = {
            key: made for key, made in adapters.items() if all(getattr(key, name) == usual[name] for name in fixed)
        }
        names = list(dict.fromkeys(label.format(key) for key in found))
        for key, made in found.items():
            name = label.format(key)
            style = looks[names.index(name)]
            axes.plot(
                list(made),
                [float(row["validation_accuracy"]) for row in made.values()],
                color=style.color,
                marker=style.marker,
                ls=style.line,
                ms=5,
                label=None if name in _labels(axes) else name,
            )
        for width in {key.width for key in found}:
            axes.axvline(limit_of(width), color=INK, lw=0.8)
        axes.set_xscale("log")
        axes.set_xticks(lrs, [f"{lr:g}" for lr in lrs], fontsize=7)
        axes.minorticks_off()
        axes.set_ylim(0.46, 0.91)
        axes.set_xlabel("learning rate")
        axes.set_title(title, fontsize=10)
        if names:
            axes.legend(fontsize=7, edgecolor="none", loc="lower left")
    all_axes[0].set_ylabel("accuracy")
    return figure


def calibration_figure(rows: Sequence[Row]) -> Any | None:
    """NLL and calibration error of the claims, in-domain and shifted, with 95 % intervals."""
    tasks = [task for task in ("full", "over") if select(rows, task=task, split="test")]
    if not tasks:
        return None
    figure, all_axes = _figure(2 * len(tasks), width=3.1 * 2 * len(tasks))
    for number, task in enumerate(tasks):
        for axes, metric in zip(all_axes[2 * number :], ("nll", "ece"), strict=False):
            labels: list[str] = []
            for method, lr in contenders(task):
                found = select(rows, task=task, method=method, lr=lr, split="test", options="", steps=0)
                if not found:
                    continue
                at = len(labels)
                labels.append(f"{NAMES[method].replace('IVON, ', '')}\n{lr:g}")
                for offset, name, filled in ((-0.12, "test", True), (0.12, "shifted", False)):
                    value = summary(found, f"{name}_{metric}")
                    _point(axes, at + offset, value, method, filled=filled, label=None)
            axes.set_xticks(range(len(labels)), labels, fontsize=7)
            axes.set_xlim(-0.6, len(labels) - 0.4)
            axes.set_title(f"{'all sentences' if task == 'full' else '256 sentences'}: {metric.upper()}", fontsize=10)
    axes.plot([], [], "o", color=INK, label="test")
    axes.plot([], [], "o", color=INK, mfc="white", label="shifted")
    _legend(axes)
    return figure


def averaging_figure(averaged: Sequence[Row]) -> Any | None:
    """What averaging over samples changes in NLL and accuracy, against the mean, over their number."""
    tasks = [task for task in minilm.TASKS if select(averaged, task=task)]
    if not tasks:
        return None
    figure, all_axes = _figure(2 * len(tasks), width=3.3 * 2 * len(tasks))
    panels = [(task, metric, head) for task in tasks for metric, head in (("nll", "NLL"), ("accuracy", "accuracy"))]
    for axes, (task, metric, head) in zip(all_axes, panels, strict=True):
        counts = [n for n in averaging.COUNTS if n and select(averaged, task=task, samples=n)]
        for shift, name in ((0.97, "test"), (1.03, "shifted")):
            at_mean = by_seed(select(averaged, task=task, samples=0), f"{name}_{metric}")
            gains = [
                paired(by_seed(select(averaged, task=task, samples=n), f"{name}_{metric}"), at_mean) for n in counts
            ]
            style = STYLES[name]
            axes.errorbar(
                [n * shift for n in counts],
                [gain.mean for gain in gains],
                yerr=np.nan_to_num([gain.half for gain in gains]),
                color=style.color,
                marker=style.marker,
                ls=style.line,
                capsize=3,
                label=name,
            )
        axes.axhline(0, color=INK, lw=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(n) for n in counts])
        axes.set_xlabel("samples")
        axes.set_title(f"{'all sentences' if task == 'full' else '256 sentences'}: {head}", fontsize=10)
        _legend(axes)
    all_axes[0].set_ylabel("averaged over samples, minus at the mean", fontsize=8)
    return figure


def pruning_figure(cuts: Sequence[Row]) -> Any | None:
    """NLL after cutting ranks at one stroke, by criterion."""
    methods = [method for method in ("ours", "published") if select(cuts, method=method)]
    if not methods:
        return None
    figure, all_axes = _figure(len(methods), width=4.2 * len(methods))
    for axes, method in zip(all_axes, methods, strict=True):
        found = select(cuts, method=method)
        whole = by_seed(select(found, criterion="all"), "test_nll")
        for number, criterion in enumerate(oneshot.CRITERIA):
            style = STYLES[criterion]
            points = []
            for kept in sorted({int(row["kept"]) for row in select(found, criterion=criterion)}):
                values = by_seed(select(found, criterion=criterion, kept=kept), "test_nll")
                points.append((kept, interval([values[seed] - whole[seed] for seed in values])))
            axes.errorbar(
                [kept + 0.4 * (number - 1.5) for kept, _ in points],  # beside each other
                [value.mean for _, value in points],
                yerr=np.nan_to_num([value.half for _, value in points]),
                color=style.color,
                marker=style.marker,
                ls=style.line,
                capsize=3,
                label=CRITERION_NAMES[criterion],
            )
        axes.axhline(0, color=INK, lw=0.8)
        axes.set_xticks(sorted({int(row["kept"]) for row in found if row["criterion"] != "all"}))
        axes.set_xlabel(f"ranks kept (of {select(found, criterion='all')[0]['kept']})")
        axes.set_title(f"trained by {NAMES[method]}", fontsize=10)
        _legend(axes)
    all_axes[0].set_ylabel("rise of the test NLL")
    return figure


def _measured(series: dict[str, list[Row]], column: str) -> dict[str, list[Row]]:
    """The series that have numbers in a column."""
    return {method: rows for method, rows in series.items() if by_seed(rows, column)}


def _figure(columns: int, width: float) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(np.atleast_1d(figure.subplots(1, columns)))
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(axis="y", color="#E5E5E5")
        each.set_axisbelow(True)
        each.tick_params(labelsize=8)
    return figure, axes


def _point(
    axes: Any, x: float, value: Interval | None, method: str, *, filled: bool = True, label: str | None = ""
) -> None:
    """A mean with its interval; labelled once per picture."""
    if value is None:
        return
    style = STYLES[method]
    name = NAMES[method] if label == "" and not any(NAMES[method] == h for h in _labels(axes)) else None
    axes.errorbar(
        [x],
        [value.mean],
        yerr=[np.nan_to_num(value.half)],
        color=style.color,
        marker=style.marker,
        mfc=style.color if filled else "white",
        ls="none",
        ms=6,
        capsize=3,
        label=name,
    )


def _labels(axes: Any) -> list[str]:
    return list(axes.get_legend_handles_labels()[1])


def _legend(axes: Any) -> None:
    if _labels(axes):
        axes.legend(fontsize=7, edgecolor="none")
