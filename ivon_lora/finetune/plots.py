"""The pictures of a run, drawn from its report and its posterior."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ivon_lora.finetune.errors import InputError
from ivon_lora.finetune.files import replace_file
from ivon_lora.finetune.history import QUANTILES
from ivon_lora.plots import plot_rank_history, plot_ranks, plot_reliability, plot_snr
from ivon_lora.plots.style import BLUE, GREY, new_figure, tidy
from ivon_lora.posterior.metrics import Reliability
from ivon_lora.posterior.posterior import PosteriorFile

__all__ = ["KINDS", "PICTURES", "draw_pictures", "require_matplotlib", "save_figure"]

#: what `draw_pictures` can draw; the names of the files without their ending
PICTURES = ("ranks", "training", "reliability", "snr")
KINDS = ("png", "pdf", "svg")
SMOOTHING = 0.9
DPI = 150


def require_matplotlib() -> None:
    """InputError where matplotlib is missing: said before the training, not after it."""
    try:
        new_figure(1, 1)
    except ImportError as error:
        raise InputError(str(error)) from None


def draw_pictures(
    report: dict[str, Any],
    posterior: PosteriorFile | None,
    folder: Path,
    names: Sequence[str] = PICTURES,
    kind: str = "png",
) -> list[Path]:
    """Draw what the run has of ``names`` into ``folder``, each file as a whole; returns the files.

    Args:
        report: of `build_report`, or what was read from its file.
        posterior: of the run; None without one, which leaves out "snr".
        folder: where the files go.
        names: of `PICTURES`.
        kind: of `KINDS`.
    """
    figures: dict[str, Any] = {}
    if "ranks" in names:
        figures["ranks"] = plot_ranks(report["ranks"], report["settings"]["rank"]).figure
    if "training" in names:
        figures["training"] = training_figure(report)
    if "reliability" in names and any("reliability" in row for row in report["results"]):
        figures["reliability"] = reliability_figure(report["results"])
    if "snr" in names and posterior is not None:
        figures["snr"] = plot_snr(posterior).figure
    return [save_figure(figure, folder / f"{name}.{kind}") for name, figure in figures.items()]


def training_figure(report: dict[str, Any]) -> Any:
    """Loss, rank budget and live ranks, and quantiles of the signal-to-noise ratio over the steps."""
    history = report["history"]
    with_snr = bool(history["snr_steps"])
    figure = new_figure(6.4, 7.2 if with_snr else 5.0)
    panels = figure.subplots(3 if with_snr else 2, 1, sharex=True)
    steps = range(1, len(history["loss"]) + 1)

    loss = panels[0]
    loss.plot(steps, history["loss"], color=GREY, linewidth=0.8, alpha=0.6, label="batch")
    loss.plot(steps, _smooth(history["loss"]), color=BLUE, linewidth=1.8, label="smoothed")
    loss.set_ylabel("training loss (nats)")
    loss.set_ylim(0, 1.2 * max(history["loss"]))
    loss.legend(frameon=False, ncols=2, loc="upper right")

    plot_rank_history(history["live"], history["budget"], axes=panels[1])
    panels[1].set_xlabel("")
    if with_snr:
        _plot_snr_history(panels[2], history["snr_steps"], history["snr"])
    panels[-1].set_xlabel("step")
    panels[-1].set_xlim(1, max(2, len(history["loss"])))
    for panel in panels:
        tidy(panel)
    figure.align_ylabels(list(panels))
    settings = report["settings"]
    figure.suptitle(
        f"{settings['optimizer']}, {settings['model']}, seed {settings['seed']}", fontsize=10, x=0.02, ha="left"
    )
    return figure


def reliability_figure(results: Sequence[dict[str, Any]]) -> Any:
    """One panel for each test set: at the mean of the weights on all texts, and averaged over samples."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for row in results:
        if "reliability" in row:
            rows.setdefault((row["set"], row["weights"]), row)  # the first has all texts
    sets = list(dict.fromkeys(row["set"] for row in results))
    figure = new_figure(4.6 * len(sets), 5.0)
    panels = figure.subplots(1, len(sets), squeeze=False)[0]
    for panel, name in zip(panels, sets, strict=True):
        panel.set_title(f"{name} set", fontsize=10, loc="left")
        for (_, weights), row in rows.items():
            if row["set"] == name:
                plot_reliability(_bins(row["reliability"]), weights, panel)
    return figure


def save_figure(figure: Any, path: Path) -> Path:
    """Write a figure in the format that the ending of ``path`` names."""
    with replace_file(path) as scratch:
        figure.savefig(scratch, dpi=DPI, format=path.suffix.removeprefix("."))
    return path


def _bins(row: dict[str, list[Any]]) -> Reliability:
    """The bins of a report, where an empty bin has no confidence."""
    numbers = [tuple(float("nan") if x is None else float(x) for x in row[name]) for name in ("confidence", "accuracy")]
    return Reliability(tuple(row["count"]), *numbers)


def _plot_snr_history(axes: Any, steps: list[int], quantiles: list[list[float]]) -> None:
    columns = list(zip(*quantiles, strict=True))
    outer, inner = (columns[0], columns[-1]), (columns[1], columns[-2])
    percent = [f"{100 * q:g}" for q in QUANTILES]
    axes.fill_between(steps, *outer, color=BLUE, alpha=0.15, linewidth=0, label=f"{percent[0]} to {percent[-1]} %")
    axes.fill_between(steps, *inner, color=BLUE, alpha=0.35, linewidth=0, label=f"{percent[1]} to {percent[-2]} %")
    axes.plot(steps, columns[len(columns) // 2], color=BLUE, linewidth=1.8, label="median")
    axes.set_ylabel("|mean| / std, live ranks")
    axes.set_ylim(0, 1.3 * max(outer[1]))
    axes.legend(frameon=False, ncols=3, loc="upper right")


def _smooth(values: list[float]) -> list[float]:
    """Exponential mean, corrected for its start."""
    out, mean, weight = [], 0.0, 0.0
    for value in values:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        out.append(mean / weight)
    return out
