"""Memory for many small tensors: neighbours lie next to each other, so that they can be read and written as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: elements that share one piece of memory, at most: whoever keeps one tensor of them keeps no more than that
LIMIT = 1 << 17


def is_small(elements: int, limit: int) -> bool:
    """Whether a tensor is worth sharing memory."""
    return 0 < 2 * elements < limit


def packs(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Which of some small tensors share memory: their positions, in order.

    Args:
        sizes: elements that each takes, with the gap behind it.
        limit: elements of one pack.
    """
    found: list[list[int]] = []
    room = -1
    for position, size in enumerate(sizes):
        if size > room:
            found.append([])
            room = limit
        found[-1].append(position)
        room -= size
    return found


def together(params: Sequence[Tensor], dtype: torch.dtype, limit: int = 0) -> dict[Tensor, Tensor]:
    """Memory of a parameter's shape for each small one of ``params``, which are on CPU; each begins at a multiple of 4.

    Args:
        limit: elements of one pack; 0: `LIMIT`.

    Returns:
        parameter -> contiguous, uninitialised tensor.
    """
    limit = limit or LIMIT
    small = [p for p in params if is_small(p.numel(), limit)]
    found: dict[Tensor, Tensor] = {}
    sizes = [-(-p.numel() // 4) * 4 for p in small]
    for pack in packs(sizes, limit):
        pieces = torch.empty(sum(sizes[i] for i in pack), dtype=dtype).split([sizes[i] for i in pack])
        for i, piece in zip(pack, pieces, strict=True):
            found[small[i]] = piece[: small[i].numel()].view(small[i].shape)
    return found
