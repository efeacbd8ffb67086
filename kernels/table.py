"""What a launch reads, on the device: a row for every tensor, the scalars of every group, the key, and a work list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ivon_lora.functional.ivon import Hyper
from ivon_lora.functional.noise import NoiseKey
from ivon_lora.kernels import formulas, tiles

if TYPE_CHECKING:
    from ivon_lora.backends.batch import Batch

#: dtypes of parameters and gradients, as the kernels take them
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

#: the roles of a batch whose addresses are the first columns of the table, in their order
ROLES = (
    "param", "mean", "momentum", "hess", "grad", "banked_grad", "banked_curvature", "sensitivity", "uncertainty",
    "rank_mask",
)  # fmt: skip
#: those of tensors that programs read in vectors
_VECTORS = slice(tiles.PARAM.value, tiles.UNCERTAINTY.value + 1)


def rows_of(batches: Sequence[Batch]) -> np.ndarray:
    """What the batches say of their tensors: int64 [n, N_COLUMNS], without the columns of `lay_out`."""
    parts = []
    for group, batch in enumerate(batches):
        rows = np.zeros((len(batch), tiles.N_COLUMNS.value), np.int64)
        for column, role in enumerate(ROLES):
            rows[:, column] = batch.addresses(role)
        rows[:, tiles.GROUP.value], rows[:, tiles.SLOT.value] = group, -1
        numel, index, offset, ranks, inner = batch.numbers
        rows[:, tiles.NUMEL.value], rows[:, tiles.INDEX.value], rows[:, tiles.OFFSET.value] = numel, index, offset
        rows[:, tiles.RANKS.value], rows[:, tiles.INNER.value] = np.maximum(ranks, 1), np.maximum(inner, 1)
        aligned = np.bitwise_or.reduce(rows[:, _VECTORS], axis=1) & 15 == 0
        rows[:, tiles.ALIGNED.value] = aligned & (rows[:, tiles.OFFSET.value] & 3 == 0)
        parts.append(rows)
    return np.concatenate(parts)


def lay_out(rows: np.ndarray, tile: int) -> tuple[np.ndarray, np.ndarray]:
    """How tensors are cut into tiles.

    Args:
        rows: of `rows_of`, int64 [n, N_COLUMNS].
        tile: largest number of elements.

    Returns:
        int64 [n, 5], the columns from KIND to INNER_RECIPROCAL; and the work list, int64 [2, n_tiles]: the items, and
        rank and change of their first lanes (see `tiles.rank_at`), each in one half.
    """
    offset, numel, ranks, inner = (
        rows[:, c.value] for c in (tiles.OFFSET, tiles.NUMEL, tiles.RANKS, tiles.INNER)
    )  # fmt: skip
    lanes, before = tiles.LANES.value, offset & 3
    rank_tiles = _even_tiles(inner, tile)
    by_rank = (ranks > 1) & (inner >= lanes) & (offset % inner == 0) & (rank_tiles > 0)
    one_rank = (ranks == 1) | by_rank
    period = np.lcm(ranks * inner, 4)
    periodic = ~one_rank & (period <= lanes)
    kind = np.select([one_rank, periodic], [tiles.ONE_RANK.value, tiles.PERIODIC.value], tiles.MIXED.value)
    line = np.where(periodic, lanes // np.minimum(period, lanes) * period, lanes)
    span = np.where(by_rank, inner // np.maximum(rank_tiles, 1), line * (tile // lanes))
    columns = np.stack([kind, line, span, (2**32 - 1) // ranks, (2**32 - 1) // inner], axis=1)
    n_tiles = np.where(numel > 0, -(-(numel + before) // span), 0)
    row = np.repeat(np.arange(len(rows)), n_tiles)
    number = np.arange(len(row)) - np.repeat(np.cumsum(n_tiles) - n_tiles, n_tiles)
    element = (offset - before)[row] + number * span[row]
    rank, inner = element // inner[row] % ranks[row], inner[row]
    change = np.where(one_rank[row], tile, np.minimum(inner - element % inner, tile))
    return columns, np.stack([row << 32 | number, rank << 32 | change])


def _even_tiles(inner: np.ndarray, tile: int) -> np.ndarray:
    """Into how many tiles of equal size a rank of so many elements can be cut; 0 where they would be small.

    A tile is a whole number of quads, and more than half of what fits.
    """
    found = np.zeros_like(inner)
    for value in np.unique(inner).tolist():
        fewest = -(-value // tile)
        counts = range(fewest, 2 * fewest) if value % 4 == 0 else ()
        found[inner == value] = next((n for n in counts if value % (4 * n) == 0), 0)
    return found


def tables(
    rows: np.ndarray, hypers: Sequence[Hyper], key: NoiseKey | None, n_samples: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """The numbers of a launch on the device, in one copy.

    Args:
        rows: of `rows_of`, with the columns of `lay_out`.
        hypers: of every group.

    Returns:
        rows; scalars, fp32 [n_groups, N_HYPER]; key, int64 [4]: the seed's bit pattern, `NoiseKey.c1`, the step.
    """
    scalars = np.zeros((len(hypers), formulas.N_HYPER.value), np.float32)
    scalars[:, : formulas.N_SAMPLES.value + 1] = [hyper.scalars(n_samples) for hyper in hypers]
    words = np.array([0, 0, 0, 0] if key is None else [key.seed, key.c1, key.step, 0], np.uint64)
    parts = [words.view(np.int64), scalars.view(np.int64).ravel(), rows.ravel()]  # all begin at multiples of 16 bytes
    words_there, scalars_there, rows_there = on_device(np.concatenate(parts), device).split([x.size for x in parts])
    return rows_there.view(rows.shape), scalars_there.view(torch.float32).view(scalars.shape), words_there


def on_device(values: np.ndarray, device: torch.device) -> Tensor:
    """int64 numbers on the device, without waiting for it.

    The pinned memory in between may go at once: PyTorch's allocator gives it to nobody before the copy is over.
    """
    source = torch.from_numpy(values)
    return source.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else source
