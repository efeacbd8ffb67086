"""Figures, colours and frames that all pictures share."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's palette, told apart by colour-blind readers; lines and markers also differ in form.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6E6E6E"
COLOURS = (BLUE, ORANGE, GREEN, GREY)
MARKERS = ("o", "s", "^", "D")
LINES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)))


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches, that can be saved. ImportError where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'ivon-lora[plot]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def or_new_axes(axes: Axes | None, width: float, height: float) -> Axes:
    """``axes``, or those of a new figure of this size in inches."""
    return new_figure(width, height).add_subplot() if axes is None else axes


def tidy(axes: Axes, grid: str = "y") -> None:
    """Fewer lines: no frame at the top and right, a light grid along ``grid``, behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#E5E5E5", linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
