"""The pictures of a run, drawn from its report and its posterior; or of an adapter, from its ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ivon_lora.cli.errors import InputError
from ivon_lora.plots import plot_rank_history, plot_ranks, plot_reliability, plot_snr
from ivon_lora.plots.style import BLUE, new_figure, tidy
from ivon_lora.posterior.metrics import Reliability
from ivon_lora.posterior.posterior import PosteriorFile

__all__ = ["KINDS", "PICTURES", "draw_pictures", "require_matplotlib"]

#: what there is to draw; the names of the files without their ending
PICTURES = ("ranks", "training", "reliability", "snr")
KINDS = ("png", "pdf", "svg")
DPI = 150


def require_matplotlib() -> None:
    """InputError where matplotlib is missing: said before the training, not after it."""
    try:
        new_figure(1, 1)
    except ImportError as error:
        raise InputError(str(error)) from None


def draw_pictures(
    report: Mapping[str, Any],
    posterior: PosteriorFile | None,
    folder: Path,
    names: Sequence[str] = PICTURES,
    kind: str = "png",
) -> list[Path]:
    """Draw what there is of ``names`` into ``folder``; returns the files.

    Args:
        report: of a run; of an adapter, a mapping with its ``ranks``.
        posterior: None leaves out "snr".
        folder: where the files go.
        names: of `PICTURES`.
        kind: of `KINDS`.
    """
    figures: dict[str, Any] = {}
    if "ranks" in names:
        figures["ranks"] = plot_ranks(report["ranks"], report.get("settings", {}).get("rank")).figure
    if "training" in names and "history" in report:
        figures["training"] = training_figure(report)
    if "reliability" in names and "results" in report:
        figures["reliability"] = reliability_figure(report["results"])
    if "snr" in names and posterior is not None:
        figures["snr"] = plot_snr(posterior).figure
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.{kind}" for name in figures}
    for name, figure in figures.items():
        figure.savefig(files[name], dpi=DPI)
    return list(files.values())


def training_figure(report: Mapping[str, Any]) -> Any:
    """Loss, rank budget and live ranks, and quantiles of the signal-to-noise ratio over the steps."""
    history, settings = report["history"], report["settings"]
    panels = 1 + ("live" in history) + ("snr_p50" in history)
    figure = new_figure(6.4, 0.6 + 2.2 * panels)
    axes = list(figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0])
    axes[0].plot(history["step"], history["loss"], color=BLUE, linewidth=1.8)
    axes[0].set_ylabel("training loss (nats)")
    axes[0].set_ylim(0, 1.2 * max(history["loss"]))
    if "live" in history:
        plot_rank_history(history["live"], history["budget"], history["step"], axes[1])
        axes[1].set_xlabel("")
    if "snr_p50" in history:
        band = axes[2].fill_between(history["step"], history["snr_p10"], history["snr_p90"], color=BLUE, alpha=0.25)
        band.set(linewidth=0, label="10 to 90 %")
        axes[2].plot(history["step"], history["snr_p50"], color=BLUE, linewidth=1.8, label="median")
        axes[2].set_ylabel("|mean| / std of the weights")
        axes[2].set_ylim(0, 1.3 * max(history["snr_p90"]))
        axes[2].legend(frameon=False, ncols=2, loc="upper right")
    for panel in axes:
        tidy(panel)
    axes[-1].set_xlabel("step")
    axes[-1].set_xlim(0, history["step"][-1])
    figure.align_ylabels(axes)
    title = f"{settings['optimizer']}, {settings['model']}, seed {settings['seed']}"
    figure.suptitle(title, fontsize=10, x=0.02, ha="left")
    return figure


def reliability_figure(results: Sequence[Mapping[str, Any]]) -> Any:
    """One panel for each test set: at the mean of the weights on all texts, and averaged over samples."""
    rows: dict[tuple[str, str], Mapping[str, Any]] = {}
    for row in results:
        rows.setdefault((row["set"], row["weights"]), row)  # the first has all texts
    sets = list(dict.fromkeys(name for name, _ in rows))
    figure = new_figure(4.6 * len(sets), 5.0)
    for panel, name in zip(figure.subplots(1, len(sets), squeeze=False)[0], sets, strict=True):
        panel.set_title(f"{name} set", fontsize=10, loc="left")
        for (of, weights), row in rows.items():
            if of == name:
                plot_reliability(_bins(row["reliability"]), weights, panel)
    return figure


def _bins(row: Mapping[str, list[Any]]) -> Reliability:
    """The bins of a report, where an empty bin has neither confidence nor accuracy."""
    numbers = [tuple(float("nan") if x is None else float(x) for x in row[name]) for name in ("confidence", "accuracy")]
    return Reliability(tuple(row["count"]), *numbers)
