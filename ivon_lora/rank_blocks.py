"""Sums of the importance of each rank's elements, a block at a time: for the eager backend on CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ivon_lora.backends import Work
from ivon_lora.functional.importance import importance
from ivon_lora.functional.ivon import root_precision


def rank_sums(
    works: Sequence[Work], rank_dims: Sequence[int], criterion: str, ess: float, weight_decay: float, block: int
) -> list[np.ndarray]:
    """Sums of the importance of each rank's elements.

    Args:
        works: fp32 state, of whole tensors.
        rank_dims: the rank dimension of each.
        criterion: one that needs no gradient.
        weight_decay: delta of the works that have none of their own.
        block: elements whose importance is computed at a time.

    Returns:
        float64 (r,) for each work; of n numbers after at most n additions in double precision.
    """
    found = []
    for w, dim in zip(works, rank_dims, strict=True):
        shape = w.hess.shape
        outer_ranks_inner = shape[:dim].numel(), shape[dim], shape[dim + 1 :].numel()
        mean, hess = (x.detach().numpy().reshape(outer_ranks_inner) for x in (w.mean, w.hess))
        delta = weight_decay if w.own_decay is None else w.own_decay.numpy().reshape(1, 1, 1)
        sums = np.zeros(shape[dim])
        with np.errstate(all="ignore"):
            for part in _parts(*outer_ranks_inner, block):
                values = importance(criterion, mean[part], root_precision(hess[part], ess, delta))
                sums[part[1]] += np.sum(values, axis=(0, 2), dtype=np.float64)
        found.append(sums)
    return found


def _parts(outer: int, ranks: int, inner: int, block: int) -> Iterator[tuple[slice, slice, slice]]:
    """Cuts (outer, ranks, inner) into parts of about ``block`` neighbours."""
    rows = max(1, block // max(ranks * inner, 1))
    if rows > 1 or ranks * inner <= block:
        for o in range(0, outer, rows):
            yield slice(o, o + rows), slice(None), slice(None)
        return
    several = max(1, block // inner)
    for o in range(outer):
        for k in range(0, ranks, several):
            for i in range(0, inner, block):
                yield slice(o, o + 1), slice(k, k + several), slice(i, i + block)
