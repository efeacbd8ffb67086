"""Layer and module of a path: the grid behind the printed table of ranks and their picture."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["RankGrid", "layer_and_module", "rank_grid"]


@dataclass(frozen=True)
class RankGrid:
    """``cells[i][j]`` is the number of live ranks of module j in layer i; None where there is no such module."""

    layers: tuple[str, ...]
    modules: tuple[str, ...]
    cells: tuple[tuple[int | None, ...], ...]


def layer_and_module(path: str) -> tuple[str, str]:
    """The first number in a path is the layer, what follows it is the module; ``("-", path)`` without a number.

    ``encoder.layer.3.attention.self.query`` is module ``attention.self.query`` of layer 3.
    """
    match = re.search(r"(?:^|\.)(\d+)\.(.+)", path)
    return (match.group(1), match.group(2)) if match else ("-", path)


def rank_grid(ranks: Mapping[str, int]) -> RankGrid:
    """Arrange ranks by the layer and module of their path."""
    cells: dict[tuple[str, str], int] = {}
    for path, rank in ranks.items():
        place = layer_and_module(path)
        cells[place] = cells.get(place, 0) + rank
    layers = sorted(
        {layer for layer, _ in cells}, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0)
    )
    modules = list(dict.fromkeys(module for _, module in cells))
    grid = tuple(tuple(cells.get((layer, module)) for module in modules) for layer in layers)
    return RankGrid(tuple(layers), tuple(modules), grid)
