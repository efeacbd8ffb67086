"""Layer and module of a path: the grid behind the printed table of ranks and their picture."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

__all__ = ["RankGrid", "layers_and_modules", "rank_grid"]

NUMBERED = re.compile(r"^(?:(?P<stem>.*?)\.)?(?P<layer>\d+)\.(?P<module>.+)$")


@dataclass(frozen=True)
class RankGrid:
    """``cells[i][j]`` is the number of live ranks of module j in layer i; None where there is no such module."""

    layers: tuple[str, ...]
    modules: tuple[str, ...]
    cells: tuple[tuple[int | None, ...], ...]


def layers_and_modules(paths: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Path -> (layer, module): the first number in a path is the layer, what follows it is the module.

    ``encoder.layer.3.attention.self.query`` is module ``attention.self.query`` of layer 3; a path without a number is a
    module of layer ``"-"``. Where several stacks are numbered, their names come before the module:
    ``encoder.block.0.q`` and ``decoder.block.0.q`` are ``encoder.q`` and ``decoder.q``.
    """
    found = {path: NUMBERED.match(path) for path in paths}
    stems = list(dict.fromkeys(match["stem"] or "" for match in found.values() if match))
    short = dict(zip(stems, _without_common([stem.split(".") if stem else [] for stem in stems]), strict=True))
    return {
        path: ("-", path) if match is None else (match["layer"], short[match["stem"] or ""] + match["module"])
        for path, match in found.items()
    }


def rank_grid(ranks: Mapping[str, int]) -> RankGrid:
    """Arrange ranks by the layer and module of their path."""
    places = layers_and_modules(ranks)
    cells: dict[tuple[str, str], int] = {}
    for path, rank in ranks.items():
        cells[places[path]] = cells.get(places[path], 0) + rank
    layers = sorted(
        {layer for layer, _ in cells}, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0)
    )
    modules = list(dict.fromkeys(module for _, module in cells))
    grid = tuple(tuple(cells.get((layer, module)) for module in modules) for layer in layers)
    return RankGrid(tuple(layers), tuple(modules), grid)


def _without_common(stems: list[list[str]]) -> list[str]:
    """Each stem without the components that all of them begin or end with, and with a dot behind what is left."""
    for end in (0, -1):
        while all(stems) and stems and len({stem[end] for stem in stems}) == 1:
            for stem in stems:
                del stem[end]
    return [".".join([*stem, ""]) for stem in stems]
