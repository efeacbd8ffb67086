"""Ranks by layer and module: the grid behind the printed table and the picture."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["RankGrid", "rank_grid"]


@dataclass(frozen=True)
class RankGrid:
    """``cells[i][j]`` is the number of live ranks of module j in layer i; None where there is no such module."""

    layers: tuple[str, ...]
    modules: tuple[str, ...]
    cells: tuple[tuple[int | None, ...], ...]


def rank_grid(ranks: dict[str, int]) -> RankGrid:
    """Arrange ranks by module path: the first number in the path is the layer, what follows it is the module.

    A path without a number goes to the layer ``"-"``. ``encoder.layer.3.attention.self.query`` is module
    ``attention.self.query`` of layer 3.
    """
    cells: dict[tuple[str, str], int] = {}
    for path, rank in ranks.items():
        match = re.search(r"(?:^|\.)(\d+)\.(.+)", path)
        layer, module = (match.group(1), match.group(2)) if match else ("-", path)
        cells[layer, module] = cells.get((layer, module), 0) + rank
    layers = sorted(
        {layer for layer, _ in cells}, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0)
    )
    modules = list(dict.fromkeys(module for _, module in cells))
    grid = tuple(tuple(cells.get((layer, module)) for module in modules) for layer in layers)
    return RankGrid(tuple(layers), tuple(modules), grid)
