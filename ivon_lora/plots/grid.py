"""Layer and module of a path: the grid behind the printed table of ranks and their picture."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

NUMBERED = re.compile(r"^(?:(?P<stem>.*?)\.)?(?P<layer>\d+)\.(?P<module>.+)$")


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


def rank_grid(ranks: Mapping[str, int]) -> tuple[list[str], dict[str, list[int | None]]]:
    """Ranks by the layer and module of their path: the layers, and a row for each module; None where it is absent."""
    places, cells = layers_and_modules(ranks), dict[tuple[str, str], int]()
    for path, rank in ranks.items():
        cells[places[path]] = cells.get(places[path], 0) + rank
    layers = sorted({layer for layer, _ in cells}, key=lambda name: int(name) if name.isdigit() else float("inf"))
    return layers, {module: [cells.get((layer, module)) for layer in layers] for _, module in cells}


def _without_common(stems: list[list[str]]) -> list[str]:
    """Each stem without the components that all of them begin or end with, and with a dot behind what is left."""
    for end in (0, -1):
        while all(stems) and stems and len({stem[end] for stem in stems}) == 1:
            for stem in stems:
                del stem[end]
    return [".".join([*stem, ""]) for stem in stems]
