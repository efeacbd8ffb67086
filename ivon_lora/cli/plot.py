"""Draw ranks, signal-to-noise ratios, training and calibration.

Draws what the folder has: ranks (layer by module), training (loss, budget, signal-to-noise over the steps), reliability
(accuracy against confidence), snr (certainty of the weights by module).

examples:
  ivon-lora plot runs/finetune                                  all pictures again, as PNG, into the run
  ivon-lora plot runs/finetune --only ranks,snr --format pdf --out paper
  ivon-lora plot my-adapter                                     ranks; with a posterior or optimizer beside it also snr
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ivon_lora import PosteriorFile
from ivon_lora.cli.arguments import add_folder
from ivon_lora.cli.errors import InputError, input_errors
from ivon_lora.cli.saved_run import read_run
from ivon_lora.plots import plot_rank_history, plot_ranks, plot_reliability, plot_snr
from ivon_lora.plots.style import BLUE, new_figure, tidy
from ivon_lora.posterior.metrics import Reliability

#: what there is to draw; the names of the files without their ending
PICTURES = ("ranks", "training", "reliability", "snr")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    add_folder(parser)
    names = ", ".join(PICTURES)
    parser.add_argument("--only", metavar="P,P", help=f"some of {names}, separated by commas (default: what there is)")
    parser.add_argument("--format", choices=("png", "pdf", "svg"), default="png", help="of the files (default: png)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: the folder)")


def run(arguments: argparse.Namespace) -> tuple[Any, str]:
    """Do what the module's docstring says."""
    names, out = (arguments.only or ",".join(PICTURES)).split(","), arguments.out or arguments.folder
    if unknown := [name for name in names if name not in PICTURES]:
        raise InputError(f"--only {unknown[0]!r} is unknown: choose {', '.join(PICTURES)}")
    if arguments.out is not None and out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: name a folder")
    run = read_run(arguments.folder, arguments.posterior, arguments.optimizer)
    there = {"ranks": True, "training": run.report, "reliability": run.report, "snr": run.posterior}
    if arguments.only and (missing := [name for name in names if not there[name]]):
        cure = "the --out of a finished run; for snr give a --posterior or --optimizer"
        raise InputError(f"--only {missing[0]}: {arguments.folder} has nothing to draw it from; give {cure}")
    with input_errors(arguments.folder):
        report = {"ranks": run.adapter.ranks} if run.report is None else run.report
        files = draw_pictures(report, run.posterior, out, names, arguments.format)
    return {"files": list(map(str, files))}, "\n".join(map(str, files))


def draw_pictures(
    report: Mapping[str, Any],
    posterior: PosteriorFile | None,
    folder: Path,
    names: Sequence[str] = PICTURES,
    kind: str = "png",
) -> list[Path]:
    """Draw what there is of ``names`` into ``folder``; returns the files. Of an adapter, the report has ``ranks``."""
    figures: dict[str, Any] = {}
    if "ranks" in names:
        initial = report.get("settings", {}).get("rank") or 0  # some methods end with more
        most = max(report["ranks"].values(), default=0)
        figures["ranks"] = plot_ranks(report["ranks"], initial if initial >= most else None).figure
    if "training" in names and "history" in report:
        figures["training"] = training_figure(report)
    if "reliability" in names and "results" in report:
        figures["reliability"] = reliability_figure(report["results"])
    if "snr" in names and posterior is not None:
        figures["snr"] = plot_snr(posterior).figure
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.{kind}", dpi=150)
    return [folder / f"{name}.{kind}" for name in figures]


def training_figure(report: Mapping[str, Any]) -> Any:
    """Loss, rank budget and live ranks, and quantiles of the signal-to-noise ratio over the steps."""
    history, settings = report["history"], report["settings"]
    steps, panels = history["step"], 1 + ("live" in history) + ("snr_p50" in history)
    figure = new_figure(6.4, 0.6 + 2.2 * panels)
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    axes[0].plot(steps, history["loss"], color=BLUE, linewidth=1.8)
    axes[0].set(ylabel="training loss (nats)", ylim=(0, 1.2 * max(history["loss"])))
    if "live" in history:
        plot_rank_history(history["live"], history["budget"], steps, axes[1])
    if "snr_p50" in history:
        low, middle, high = (history[f"snr_{p}"] for p in ("p10", "p50", "p90"))
        axes[-1].fill_between(steps, low, high, color=BLUE, alpha=0.25, linewidth=0, label="10 to 90 %")
        axes[-1].plot(steps, middle, color=BLUE, linewidth=1.8, label="median")
        axes[-1].set(ylabel="|mean| / std of the weights", ylim=(0, 1.3 * max(high)))
        axes[-1].legend(frameon=False, ncols=2, loc="upper right")
    for panel in axes:
        panel.set(xlabel="step" if panel is axes[-1] else "", xlim=(0, steps[-1]))
        tidy(panel)
    figure.align_ylabels(list(axes))
    title = f"{settings['method']}, {settings['optimizer']}, {settings['model']}, seed {settings['seed']}"
    figure.suptitle(title, fontsize=10, x=0.02, ha="left")
    return figure


def reliability_figure(results: Sequence[Mapping[str, Any]]) -> Any:
    """One panel for each test set: at the mean of the weights on all texts, and averaged over samples."""
    rows: dict[tuple[str, str], Mapping[str, Any]] = {}
    for row in results:
        rows.setdefault((row["set"], row["weights"]), row)  # the first has all texts
    sets = list(dict.fromkeys(name for name, _ in rows))
    figure = new_figure(4.6 * len(sets), 5.0)
    panels = dict(zip(sets, figure.subplots(1, len(sets), squeeze=False)[0], strict=True))
    for (name, weights), row in rows.items():
        plot_reliability(Reliability(**row["reliability"]), weights, panels[name])
        panels[name].set_title(f"{name} set", fontsize=10, loc="left")
    return figure
