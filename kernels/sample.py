"""Draw a posterior sample into every parameter of a launch: theta = m + sigma eps, and keep the mean beside it."""

import triton
import triton.language as tl

from ivon_lora.kernels import tiles
from ivon_lora.kernels.formulas import draw_sample
from ivon_lora.kernels.noise import quad_normals


@triton.jit
def tile_normals(quads, row, scalars, TILE: tl.constexpr):
    """eps of a tile's elements: fp32 [TILE]."""
    seed, c1, step = tl.load(scalars + tiles.SEED), tl.load(scalars + tiles.C1), tl.load(scalars + tiles.STEP)
    n0, n1, n2, n3 = quad_normals(quads, seed, c1, tl.load(row + tiles.INDEX), step)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (TILE,)) * tiles.scalar(scalars, tiles.SIGN)


@triton.jit
def _sample_tile(
    item, row, scalars, TILE: tl.constexpr, DTYPE: tl.constexpr, MASKED: tl.constexpr, COPY: tl.constexpr,
    REREAD: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    offsets, exists, quads = tiles.lanes(item, row, TILE, VECTOR)
    param = tiles.anything(row, tiles.PARAM, DTYPE, VECTOR)
    mean = tiles.load(tiles.floats(row, tiles.MEAN, VECTOR), offsets, exists, 0)
    hess = tiles.load(tiles.floats(row, tiles.HESS, VECTOR), offsets, exists, 0)
    if REREAD:
        written = tiles.load(param, offsets, exists, DTYPE)
        mean = tl.where(tiles.rounded(mean, DTYPE) == written, mean, written)
    if COPY:
        tiles.store(tiles.floats(row, tiles.MEAN_OUT, VECTOR), offsets, mean, exists, 0)
    if MASKED:
        active = tiles.active(item, row, exists, TILE, VECTOR)  # before the noise, which needs the registers
        eps = tl.where(active, tile_normals(quads, row, scalars, TILE), 0.0)
    else:
        eps = tile_normals(quads, row, scalars, TILE)
    ess, weight_decay = tiles.scalar(scalars, tiles.NOISE_ESS), tiles.weight_decay(row, scalars)
    tiles.store(param, offsets, draw_sample(mean, hess, eps, ess, weight_decay), exists, DTYPE)


@triton.jit
def sample_kernel(
    tensors, items, scalars, TILE: tl.constexpr, DTYPE: tl.constexpr, MASKED: tl.constexpr, COPY: tl.constexpr,
    REREAD: tl.constexpr,
):  # fmt: skip
    """One tile of the work list.

    tensors, items, scalars: int64 tables, see `tiles`.  DTYPE: of the parameters.  MASKED: some tensor has a hard rank
    mask.  COPY: every tensor has a MEAN_OUT.  REREAD: where the mean no longer rounds to the 16-bit parameter, the
    parameter is the mean.
    """
    item = items + tl.program_id(0).to(tl.int64) * tiles.ITEM_COLUMNS
    row = tensors + tl.load(item + tiles.ITEM_TENSOR) * tiles.TENSOR_COLUMNS
    if tl.load(item + tiles.ITEM_KIND) == tiles.SCATTERED:
        _sample_tile(item, row, scalars, TILE, DTYPE, MASKED, COPY, REREAD, False)
    else:
        _sample_tile(item, row, scalars, TILE, DTYPE, MASKED, COPY, REREAD, True)
