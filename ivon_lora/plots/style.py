"""Figures, colours and frames that all pictures share."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["BLUE", "GREEN", "GREY", "MARKERS", "ORANGE", "new_figure", "or_new_axes", "readable_on", "tidy"]

# Okabe & Ito's palette, told apart by colour-blind readers; lines and markers also differ in form.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6E6E6E"
COLOURS = (BLUE, ORANGE, GREEN, GREY)
MARKERS = ("o", "s", "^", "D")


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


def readable_on(rgb: tuple[float, float, float]) -> str:
    """Black or white, whichever has more contrast on a colour of sRGB values in [0, 1] (WCAG 2.2)."""
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb)
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return "black" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "white"


def tidy(axes: Axes, grid: str = "y") -> None:
    """Fewer lines: no frame at the top and right, a light grid along ``grid``, behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#E5E5E5", linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
