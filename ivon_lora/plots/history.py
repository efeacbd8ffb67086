"""Budget and live ranks over the steps of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ivon_lora.plots.style import BLUE, ORANGE, or_new_axes, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_rank_history"]


def plot_rank_history(
    live: Sequence[float],
    budget: Sequence[float] | None = None,
    steps: Sequence[int] | None = None,
    axes: Axes | None = None,
) -> Axes:
    """Live ranks over all adapters, and the budget that allows them, after every step.

    Args:
        live: e.g. ``optimizer.metrics()["rank/live"]`` of every step.
        budget: e.g. ``["rank/budget"]``; of the same length.
        steps: step numbers; 1, 2, ... by default.
        axes: where to draw.

    Raises:
        ValueError: no steps, or lengths that differ.
    """
    numbers = range(1, len(live) + 1) if steps is None else steps
    lengths = {"live": len(live), "budget": len(live) if budget is None else len(budget), "steps": len(numbers)}
    if not len(live) or len(set(lengths.values())) > 1:
        raise ValueError(f"live, budget and steps must have one entry for each step, got {lengths}")
    axes = or_new_axes(axes, 6.4, 3.2)
    axes.step(numbers, live, where="post", color=BLUE, linewidth=1.8, label="live")
    if budget is not None:  # on top, for the two are often equal
        axes.step(numbers, budget, where="post", color=ORANGE, linewidth=1.6, linestyle="--", label="budget")
    axes.set_ylabel("ranks, all adapters")
    axes.set_xlabel("step")
    axes.set_xlim(numbers[0], max(numbers[0] + 1, numbers[-1]))
    axes.set_ylim(0, 1.08 * max([*live, *(budget or ()), 1]))
    axes.legend(frameon=False, ncols=2, loc="upper right")
    tidy(axes)
    return axes
