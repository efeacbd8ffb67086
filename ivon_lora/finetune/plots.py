"""The two pictures of a run. Figures are made without pyplot, so no global state and no display is touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import InputError
from .files import replace_file
from .history import QUANTILES
from .ranks import RankGrid, rank_grid

__all__ = ["plot_ranks", "plot_training"]

# Okabe & Ito's palette, told apart by colour-blind readers; the lines also differ in style for black-and-white print.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#8A8A8A"
SMOOTHING = 0.9
DPI = 150


def plot_ranks(report: dict[str, Any], path: Path) -> None:
    """Heat map, layer by module, of the ranks kept, with the number in each cell; written as PNG."""
    grid = rank_grid(report["ranks"])
    highest = int(report["settings"]["rank"])
    size = (2.2 + 0.95 * len(grid.modules), 2.1 + 0.42 * len(grid.layers))
    figure = _figure((max(4.8, size[0]), max(3.0, size[1])))
    from matplotlib.ticker import MaxNLocator

    axes = figure.add_subplot()
    values = [[float("nan") if cell is None else cell for cell in row] for row in grid.cells]
    # one hue from white to dark: the order survives grey print and colour blindness
    image = axes.imshow(values, cmap="Blues", vmin=0, vmax=highest, aspect="auto")
    _white_lines(axes, grid)
    _write_numbers(axes, grid, highest)
    axes.set_xticks(range(len(grid.modules)), [_two_lines(name) for name in grid.modules], fontsize=8)
    axes.set_yticks(range(len(grid.layers)), grid.layers)
    axes.set_ylabel("layer")
    axes.tick_params(which="both", length=0)
    total = sum(report["ranks"].values())
    budget = f"{total} of {highest * len(report['ranks'])}"
    axes.set_title(f"LoRA ranks kept: {budget}, at most {highest} each", fontsize=10, loc="left")
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02, shrink=min(1.0, 8 / len(grid.layers)))
    bar.set_label("ranks")
    bar.locator = MaxNLocator(integer=True)
    bar.update_ticks()
    _save(figure, path)


def plot_training(report: dict[str, Any], path: Path) -> None:
    """Loss, rank budget and live ranks, and quantiles of the signal-to-noise ratio over the steps; written as PNG."""
    history = report["history"]
    with_snr = bool(history["snr_steps"])
    figure = _figure((6.4, 7.2 if with_snr else 5.0))
    panels = figure.subplots(3 if with_snr else 2, 1, sharex=True)
    steps = range(1, len(history["loss"]) + 1)

    loss = panels[0]
    loss.plot(steps, history["loss"], color=GREY, linewidth=0.8, alpha=0.7, label="batch")
    loss.plot(steps, _smooth(history["loss"]), color=BLUE, linewidth=1.8, label="smoothed")
    loss.set_ylabel("training loss (nats)")
    loss.set_ylim(0, 1.2 * max(history["loss"]))
    loss.legend(frameon=False, ncols=2, loc="upper right")

    ranks = panels[1]
    ranks.step(steps, history["budget"], where="post", color=ORANGE, linewidth=1.6, linestyle="--", label="budget")
    ranks.step(steps, history["live"], where="post", color=BLUE, linewidth=1.8, label="live")
    ranks.set_ylabel("ranks, all adapters")
    ranks.set_ylim(0, 1.08 * max([*history["budget"], *history["live"], 1]))
    ranks.legend(frameon=False, ncols=2, loc="upper right")

    if with_snr:
        _plot_snr(panels[2], history["snr_steps"], history["snr"])
    panels[-1].set_xlabel("step")
    panels[-1].set_xlim(1, max(2, len(history["loss"])))
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#E5E5E5", linewidth=0.6)
        panel.set_axisbelow(True)
    figure.align_ylabels(list(panels))
    settings = report["settings"]
    figure.suptitle(
        f"{settings['optimizer']}, {settings['model']}, seed {settings['seed']}", fontsize=10, x=0.02, ha="left"
    )
    _save(figure, path)


def _plot_snr(axes: Any, steps: list[int], quantiles: list[list[float]]) -> None:
    columns = list(zip(*quantiles, strict=True))
    outer, inner = (columns[0], columns[-1]), (columns[1], columns[-2])
    percent = [f"{100 * q:g}" for q in QUANTILES]
    axes.fill_between(steps, *outer, color=BLUE, alpha=0.15, linewidth=0, label=f"{percent[0]} to {percent[-1]} %")
    axes.fill_between(steps, *inner, color=BLUE, alpha=0.35, linewidth=0, label=f"{percent[1]} to {percent[-2]} %")
    axes.plot(steps, columns[len(columns) // 2], color=BLUE, linewidth=1.8, label="median")
    axes.set_ylabel("|mean| / std, live ranks")
    axes.set_ylim(0, 1.3 * max(outer[1]))
    axes.legend(frameon=False, ncols=3, loc="upper right")


def _white_lines(axes: Any, grid: RankGrid) -> None:
    axes.set_xticks([j - 0.5 for j in range(1, len(grid.modules))], minor=True)
    axes.set_yticks([i - 0.5 for i in range(1, len(grid.layers))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)


def _write_numbers(axes: Any, grid: RankGrid, highest: int) -> None:
    for i, row in enumerate(grid.cells):
        for j, cell in enumerate(row):
            if cell is not None:
                colour = "white" if cell > 0.6 * highest else "black"
                axes.text(j, i, str(cell), ha="center", va="center", color=colour, fontsize=9)


def _two_lines(module: str) -> str:
    """`attention.self.query` as `attention.` over `self.query`, so that labels need no rotation."""
    head, dot, tail = module.partition(".")
    return f"{head}{dot}\n{tail}" if dot else module


def _smooth(values: list[float]) -> list[float]:
    """Exponential mean, corrected for its start."""
    out, mean, weight = [], 0.0, 0.0
    for value in values:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        out.append(mean / weight)
    return out


def _figure(size: tuple[float, float]) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("the pictures need matplotlib: run `pip install ivon-lora[demo]`") from None
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    with replace_file(path) as scratch:
        figure.savefig(scratch, dpi=DPI, format="png")
