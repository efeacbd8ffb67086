"""Reliability diagram: how often predictions are right, against how sure they are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ivon_lora.plots.style import COLOURS, GREY, LINES, MARKERS, or_new_axes, tidy
from ivon_lora.posterior.metrics import Reliability

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_reliability", "wilson"]

Z95 = 1.959963984540054


def plot_reliability(bins: Reliability, label: str | None = None, axes: Axes | None = None) -> Axes:
    """Accuracy against confidence, bin by bin, with the diagonal of perfect calibration; below it is overconfidence.

    A point is the mean of a bin with its 95 % interval (Wilson); grey bars are the share of examples in each bin. A
    second call with the same ``axes`` adds another curve, with its own form and colour, and no bars.

    Args:
        bins: of `ivon_lora.posterior.metrics.reliability`.
        label: name of the curve; its calibration error (ECE) is written behind it.
        axes: where to draw.
    """
    fresh = axes is None or not axes.containers
    axes = or_new_axes(axes, 4.6, 5.0)
    filled, width = [i for i, n in enumerate(bins.count) if n], 1 / len(bins.count)
    if fresh:
        axes.set_prop_cycle(color=COLOURS, marker=MARKERS, linestyle=LINES)
        centres, share = [(i + 0.5) * width for i in filled], [bins.count[i] / sum(bins.count) for i in filled]
        bars = f"share of examples, {label}" if label else "share of examples"
        axes.bar(centres, share, 0.94 * width, color="#D9D9D9", label=bars)
        axes.plot([0, 1], [0, 1], color=GREY, marker="", linestyle=":", linewidth=1, label="perfectly calibrated")
    ends = [wilson(bins.accuracy[i], bins.count[i]) for i in filled]
    points = [bins.accuracy[i] for i in filled]
    arms = [[abs(end[side] - p) for p, end in zip(points, ends, strict=True)] for side in (0, 1)]
    axes.errorbar(
        [bins.confidence[i] for i in filled],
        points,
        yerr=arms,
        markersize=5,
        linewidth=1.4,
        elinewidth=0.9,
        capsize=2.5,
        label=f"{label or 'predictions'}, ECE {bins.gap:.3f}, n = {sum(bins.count)}",
    )
    left = min(filled[0] * width, axes.get_xlim()[0] if not fresh else 1.0)
    axes.set_xlim(left, 1)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("confidence: probability of the predicted class")
    axes.set_ylabel("accuracy")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.14), borderaxespad=0)
    tidy(axes)
    return axes


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a proportion ``share`` of ``n`` (Wilson, JASA 1927)."""
    z2 = Z95**2 / n
    centre = (share + z2 / 2) / (1 + z2)
    half = math.sqrt(z2 * share * (1 - share) + z2**2 / 4) / (1 + z2)
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))  # rounding may pass the share
