"""How certain the weights of each kind of module are: quantiles of |mean| / std."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ivon_lora.lora.names import tensor_name
from ivon_lora.plots.grid import layers_and_modules
from ivon_lora.plots.style import COLOURS, GREY, MARKERS, or_new_axes, tidy
from ivon_lora.posterior.posterior import PosteriorFile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_snr", "snr_by_module"]

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
FLOOR = 1e-3  # the axis is logarithmic; what lies below is drawn here
FACTORS = ("A", "B", "E", "")  # "" is whatever is no factor of an adapter


def plot_snr(posterior: PosteriorFile, axes: Axes | None = None) -> Axes:
    """Distribution of |mean| / std over the weights of every kind of module, all layers together.

    Thick: the middle half; thin: 5 to 95 %; marker: the median. A, B and E of adapters have their own marker and
    colour. Left of the dotted line a weight is smaller than its standard deviation. Pruned ranks are not counted.

    Args:
        posterior: of `snapshot_posterior(optimizer)` or `load_posterior(path)`.
        axes: where to draw.

    Raises:
        ValueError: there is no weight with noise.
    """
    groups = snr_by_module(posterior)
    if not groups:
        raise ValueError("the posterior has no weight with noise: there is no signal-to-noise ratio to draw")
    modules = list(dict.fromkeys(module for module, _ in groups))
    axes = or_new_axes(axes, 6.8, 1.3 + 0.42 * len(modules))
    for (module, letter), ratios in groups.items():
        row, kind = modules.index(module), FACTORS.index(letter)
        present = [f for f in FACTORS if (module, f) in groups]
        y = row + 0.2 * (present.index(letter) - (len(present) - 1) / 2)
        q, colour = np.maximum(np.quantile(ratios.double().numpy(), QUANTILES), FLOOR), COLOURS[kind]
        axes.plot([q[0], q[-1]], [y, y], color=colour, linewidth=1)
        axes.plot([q[1], q[-2]], [y, y], color=colour, linewidth=3.6, solid_capstyle="butt")
        axes.plot(q[2], y, marker=MARKERS[kind], color=colour, markeredgecolor="white", markersize=7, zorder=3)
    axes.axvline(1, color=GREY, linewidth=1, linestyle=":")
    axes.set_xscale("log")
    axes.set_yticks(range(len(modules)), modules)
    axes.set_ylim(len(modules) - 0.5, -0.5)
    axes.set_xlabel("|mean| / std of a weight: median, middle half, 5 to 95 %")
    for kind, letter in enumerate(FACTORS):
        if any(f == letter for _, f in groups):
            label = letter or "other weights"
            axes.plot([], [], marker=MARKERS[kind], color=COLOURS[kind], markersize=7, linewidth=3.6, label=label)
    axes.legend(frameon=False, ncols=len(FACTORS), loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    tidy(axes, "x")
    return axes


def snr_by_module(posterior: PosteriorFile) -> dict[tuple[str, str], Tensor]:
    """|mean| / std of all weights with noise, by (module, factor), the layers of a module together.

    Returns:
        (module, "A", "B", "E" or "") -> ratios (n,). The module of a path is what follows its first number.
    """
    found = {}
    for name in posterior.names:
        path, part, _ = tensor_name(name)
        found[name] = path, part[-1:] if part[-1:] in FACTORS else ""
    places = layers_and_modules(path for path, _ in found.values())
    groups: dict[tuple[str, str], list[Tensor]] = {}
    for name, (path, letter) in found.items():
        alive = posterior.std[name] > 0
        ratios = (posterior.mean[name].abs() / posterior.std[name])[alive]
        groups.setdefault((places[path][1], letter), []).append(ratios)
    joined = {key: torch.cat(ratios) for key, ratios in groups.items()}  # in the order of the model, whatever lives
    return {key: ratios for key, ratios in joined.items() if len(ratios)}
