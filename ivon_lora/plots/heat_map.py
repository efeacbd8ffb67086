"""Heat map of live ranks, module by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ivon_lora.plots.grid import rank_grid
from ivon_lora.plots.style import or_new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ivon_lora.optim.ivon import IVON

__all__ = ["plot_ranks"]

NUMBERS_UP_TO = 48  # layers; with more of them the numbers would run into each other


def plot_ranks(ranks: Mapping[str, int] | IVON, highest: int | None = None, axes: Axes | None = None) -> Axes:
    """Live ranks of every adapted layer: modules are rows, layers are columns, as in AdaLoRA's figure.

    Args:
        ranks: live ranks by path of the layer (the first number in a path is the layer), or an `IVON` with a pruner.
        highest: rank of the darkest colour; by default the largest rank, of an optimizer the largest initial one.
        axes: where to draw.

    Raises:
        ValueError: there are no ranks, or the optimizer has no pruner.
    """
    if not isinstance(ranks, Mapping):
        table = ranks.rank_table()
        ranks, highest = {row["name"]: row["live"] for row in table}, highest or max(row["rank"] for row in table)
    if not ranks:
        raise ValueError("ranks is empty: give the live ranks of at least one layer")
    layers, rows = rank_grid(ranks)
    top = max(highest or 0, *ranks.values(), 1)
    width, height = 2.6 + 0.36 * len(layers), 1.5 + 0.36 * len(rows)
    axes = or_new_axes(axes, min(max(5.4, width), 16), max(2.2, height))
    _cells(axes, list(rows.values()), top)
    axes.set_xticks(range(len(layers)), layers, fontsize=9 if len(layers) <= NUMBERS_UP_TO else 6)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("layer")
    axes.tick_params(which="both", length=0)
    total, possible = sum(ranks.values()), "" if highest is None else f" of {highest * len(ranks)}"
    axes.set_title(f"LoRA ranks: {total}{possible} live in {len(ranks)} layers", fontsize=10, loc="left")
    return axes


def _cells(axes: Axes, rows: list[list[int | None]], top: int) -> None:
    from matplotlib.ticker import MaxNLocator

    values = [[float("nan") if cell is None else cell for cell in row] for row in rows]
    # one hue from white to dark: the order survives grey print and colour blindness
    image = axes.imshow(values, cmap="Blues", vmin=0, vmax=top, aspect="auto")
    axes.set_xticks([j - 0.5 for j in range(1, len(rows[0]))], minor=True)
    axes.set_yticks([i - 0.5 for i in range(1, len(rows))], minor=True)
    axes.grid(which="minor", color="#B8B8B8", linewidth=0.6)
    for i, row in enumerate(rows):
        for j, cell in enumerate(row):
            if cell is None:
                axes.plot(j, i, marker="x", markersize=5, color="#B8B8B8")
            elif len(row) <= NUMBERS_UP_TO:
                colour = "white" if cell > 0.7 * top else "black"  # whichever has more contrast
                axes.text(j, i, str(cell), ha="center", va="center", color=colour, fontsize=9)
    figure: Any = axes.figure
    figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02, label="ranks", ticks=MaxNLocator(integer=True))
