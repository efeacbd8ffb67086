"""Draw a posterior sample into every parameter of a launch: theta = m + sigma eps, and keep the mean beside it.

The plain reference is `EagerBackend.sample`, which calls `functional`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ivon_lora.kernels import formulas, tiles
from ivon_lora.kernels.noise import normals


@triton.jit
def sample_kernel(rows_ptr, items_ptr, hyper_ptr, key_ptr, FLAGS: tl.constexpr):
    """One tile. Arguments: see `table.tables`."""
    row_ptr, hyper_ptr, start, length = tiles.locate(rows_ptr, items_ptr, hyper_ptr, formulas.N_HYPER)
    rank, change = 0, 0
    if FLAGS.MASKED:
        rank, change = tiles.tile_rank(items_ptr)
    if tiles.is_vector(row_ptr, length):
        _sample_tile(row_ptr, hyper_ptr, key_ptr, start, length, rank, change, FLAGS, True)
    else:
        _sample_tile(row_ptr, hyper_ptr, key_ptr, start, length, rank, change, FLAGS, False)


@triton.jit
def _sample_tile(
    row_ptr, hyper_ptr, key_ptr, start, length, rank, change, FLAGS: tl.constexpr, VECTOR: tl.constexpr
):  # fmt: skip
    TILE: tl.constexpr = FLAGS.TILE
    DTYPE: tl.constexpr = FLAGS.DTYPE
    exists = tiles.existing(row_ptr, start, length, TILE, VECTOR)  # [TILE], as all blocks here
    offset = tiles.offsets(row_ptr, start, TILE, VECTOR)
    drawn, active = exists, exists
    if FLAGS.MASKED:
        active = tiles.active(row_ptr, rank, change, exists, TILE, VECTOR)
        dead = tiles.is_dead(row_ptr, rank).to(tl.int32)
        drawn = exists & (tl.zeros((TILE,), tl.int32) + dead == 0)  # a block, as the interpreter wants it
    mean = tiles.load(row_ptr, tiles.PARAM, offset, exists, DTYPE, VECTOR)
    hess = tiles.load(row_ptr, tiles.HESS, offset, drawn, "fp32", VECTOR)
    if DTYPE != "fp32":  # the parameter is the mean, rounded, unless somebody has written into it
        kept = tiles.load(row_ptr, tiles.MEAN, offset, exists, "fp32", VECTOR)
        mean = tl.where(tiles.rounded(kept, DTYPE) == mean, kept, mean)
    tiles.store(row_ptr, tiles.MEAN, offset, mean, exists, "fp32", VECTOR)

    eps = normals(tiles.quads(row_ptr, start, TILE, VECTOR), key_ptr, tl.load(row_ptr + tiles.INDEX))
    ess = tl.load(hyper_ptr + formulas.NOISE_ESS)
    weight_decay = tl.load(hyper_ptr + formulas.WEIGHT_DECAY)
    theta = formulas.draw_sample(mean, hess, eps, ess, weight_decay)
    noisy = active & (tl.zeros((TILE,), tl.float32) + ess < float("inf"))
    tiles.store(row_ptr, tiles.PARAM, offset, tl.where(noisy, theta, mean), drawn, DTYPE, VECTOR)
