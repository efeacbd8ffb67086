"""Where the blocks of a transformer are."""

from __future__ import annotations

from itertools import accumulate, pairwise

from torch import nn


def block_of(model: nn.Module, name: str) -> str | None:
    """Path of the block that a module lies in, or is; None for a module outside of all.

    A block is an entry of an outermost ``nn.ModuleList``; where its entries are lists themselves (Funnel), of those.
    """
    paths = list(accumulate(name.split("."), "{}.{}".format))
    are_lists = [isinstance(model.get_submodule(path), nn.ModuleList) for path in paths]
    entries = (i for i, (outside, inside) in enumerate(pairwise(are_lists), 1) if outside and not inside)
    return next((paths[i] for i in entries), None)
