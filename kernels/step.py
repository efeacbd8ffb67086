"""One step for every parameter of a launch, and the sums over earlier samples that it may take into account.

The plain references are `EagerBackend.step` and `bank`, which call `functional`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ivon_lora.kernels import formulas, sums, tiles
from ivon_lora.kernels.noise import normals


@triton.jit
def _curvature(
    grad, hess, weight_decay, row_ptr, hyper_ptr, key_ptr, start, TILE: tl.constexpr, CURVATURE: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """ghat eps / sigma, regenerating eps, or a multiple of ghat^2: fp32 [TILE]."""
    if CURVATURE == "price":
        eps = normals(tiles.quads(row_ptr, start, TILE, VECTOR), key_ptr, tl.load(row_ptr + tiles.INDEX))
        curvature = grad * (eps * formulas.root_precision(hess, tl.load(hyper_ptr + formulas.ESS), weight_decay))
    else:
        curvature = (grad * grad) * tl.load(hyper_ptr + formulas.SQUARE_SCALE)
    return curvature


@triton.jit
def bank_kernel(rows_ptr, items_ptr, hyper_ptr, key_ptr, FLAGS: tl.constexpr):
    """Add the gradient, and the curvature it implies, to the banked sums: one tile. Arguments: see `table.tables`."""
    row_ptr, hyper_ptr, start, length = tiles.locate(rows_ptr, items_ptr, hyper_ptr, formulas.N_HYPER)
    if tiles.is_vector(row_ptr, length):
        _bank_tile(row_ptr, hyper_ptr, key_ptr, start, length, FLAGS, True)
    else:
        _bank_tile(row_ptr, hyper_ptr, key_ptr, start, length, FLAGS, False)


@triton.jit
def _bank_tile(row_ptr, hyper_ptr, key_ptr, start, length, FLAGS: tl.constexpr, VECTOR: tl.constexpr):
    TILE: tl.constexpr = FLAGS.TILE
    GRAD_DTYPE: tl.constexpr = FLAGS.GRAD_DTYPE
    CURVATURE: tl.constexpr = FLAGS.CURVATURE
    exists = tiles.existing(row_ptr, start, length, TILE, VECTOR)  # [TILE], as all blocks here
    offset = tiles.offsets(row_ptr, start, TILE, VECTOR)
    grad = tiles.load(row_ptr, tiles.GRAD, offset, exists, GRAD_DTYPE, VECTOR)
    grad *= tl.load(hyper_ptr + formulas.GRAD_SCALE)
    hess = tiles.load(row_ptr, tiles.HESS, offset, exists, "fp32", VECTOR)
    banked_grad = tiles.load(row_ptr, tiles.BANKED_GRAD, offset, exists, "fp32", VECTOR)
    banked_curvature = tiles.load(row_ptr, tiles.BANKED_CURVATURE, offset, exists, "fp32", VECTOR)
    weight_decay = tl.load(hyper_ptr + formulas.WEIGHT_DECAY)
    curvature = _curvature(grad, hess, weight_decay, row_ptr, hyper_ptr, key_ptr, start, TILE, CURVATURE, VECTOR)
    tiles.store(row_ptr, tiles.BANKED_GRAD, offset, banked_grad + grad, exists, "fp32", VECTOR)
    tiles.store(row_ptr, tiles.BANKED_CURVATURE, offset, banked_curvature + curvature, exists, "fp32", VECTOR)


@triton.jit(do_not_specialize=["n_slots"])
def step_kernel(rows_ptr, items_ptr, hyper_ptr, key_ptr, nonfinite_ptr, sums_ptr, n_slots, FLAGS: tl.constexpr):
    """One tile.

    nonfinite_ptr: int64 [1], the number of elements skipped.  sums_ptr: int64 [sums.ROWS, n_slots], with a CRITERION.
    The other arguments: see `table.tables`.
    """
    TILE: tl.constexpr = FLAGS.TILE
    CRITERION: tl.constexpr = FLAGS.CRITERION
    row_ptr, hyper_ptr, start, length = tiles.locate(rows_ptr, items_ptr, hyper_ptr, formulas.N_HYPER)
    vector = tiles.is_vector(row_ptr, length)
    rank, change, dead = 0, 0, False
    if FLAGS.MASKED:  # of a pruned rank nothing changes, but for sensitivities
        rank, change = tiles.tile_rank(items_ptr)
        dead = tiles.is_dead(row_ptr, rank) & (tl.load(row_ptr + tiles.SENSITIVITY) == 0)
        if CRITERION != "":
            dead = dead & (tl.load(row_ptr + tiles.SLOT) < 0)
    if not dead:
        if vector:
            skipped, score = _step_tile(row_ptr, hyper_ptr, key_ptr, start, length, rank, change, FLAGS, True)
        else:
            skipped, score = _step_tile(row_ptr, hyper_ptr, key_ptr, start, length, rank, change, FLAGS, False)
        counters = nonfinite_ptr + tl.zeros_like(skipped)
        tl.atomic_add(counters, skipped.to(tl.int64), mask=skipped > 0, sem="relaxed")
        if CRITERION != "":  # noqa: SIM102 - known when compiling, the next one is not
            if tl.load(row_ptr + tiles.SLOT) >= 0:
                rank, change = tiles.tile_rank(items_ptr)
                sums.add(score, row_ptr, start, length, rank, change, vector, sums_ptr, n_slots, TILE)


@triton.jit
def _step_tile(
    row_ptr, hyper_ptr, key_ptr, start, length, rank, change, FLAGS: tl.constexpr, VECTOR: tl.constexpr
):  # fmt: skip
    """Update a tile; returns how many elements were skipped, line by line, and the scores: fp32 [TILE], or 0."""
    TILE: tl.constexpr = FLAGS.TILE
    DTYPE: tl.constexpr = FLAGS.DTYPE
    GRAD_DTYPE: tl.constexpr = FLAGS.GRAD_DTYPE
    CURVATURE: tl.constexpr = FLAGS.CURVATURE
    CRITERION: tl.constexpr = FLAGS.CRITERION
    exists = tiles.existing(row_ptr, start, length, TILE, VECTOR)  # [TILE], as all blocks here
    offset = tiles.offsets(row_ptr, start, TILE, VECTOR)
    observed = tiles.load(row_ptr, tiles.GRAD, offset, exists, GRAD_DTYPE, VECTOR)
    observed *= tl.load(hyper_ptr + formulas.GRAD_SCALE)
    mean = tiles.load(row_ptr, tiles.MEAN, offset, exists, "fp32", VECTOR)
    momentum = tiles.load(row_ptr, tiles.MOMENTUM, offset, exists, "fp32", VECTOR)
    hess = tiles.load(row_ptr, tiles.HESS, offset, exists, "fp32", VECTOR)
    weight_decay = tl.load(hyper_ptr + formulas.WEIGHT_DECAY)

    grad, new_hess = observed, hess
    if FLAGS.BANKED:
        n_samples = tl.zeros_like(grad) + tl.load(hyper_ptr + formulas.N_SAMPLES)
        banked_grad = tiles.load(row_ptr, tiles.BANKED_GRAD, offset, exists, "fp32", VECTOR)
        grad = tl.div_rn(grad + banked_grad, n_samples)
    if FLAGS.UPDATES_HESS:
        f = _curvature(observed, hess, weight_decay, row_ptr, hyper_ptr, key_ptr, start, TILE, CURVATURE, VECTOR)
        if FLAGS.BANKED:
            banked_curvature = tiles.load(row_ptr, tiles.BANKED_CURVATURE, offset, exists, "fp32", VECTOR)
            f = tl.div_rn(f + banked_curvature, n_samples)
        new_hess = formulas.update_hessian(hess, f, weight_decay, hyper_ptr, CURVATURE)
    new_momentum = formulas.update_momentum(momentum, grad, hyper_ptr)
    active = exists
    if FLAGS.MASKED:
        active = tiles.active(row_ptr, rank, change, exists, TILE, VECTOR)
        new_momentum = tl.where(active, new_momentum, 1.0)  # of pruned ranks all is 0, and dividing 0 is slow
    new_mean = formulas.update_mean(mean, new_momentum, new_hess, weight_decay, hyper_ptr, CURVATURE)

    finite = formulas.is_finite(new_momentum) & formulas.is_finite(new_mean)
    moved = finite & active
    new_mean, new_hess = tl.where(moved, new_mean, mean), tl.where(moved, new_hess, hess)
    new_momentum = tl.where(moved, new_momentum, momentum)
    tiles.store(row_ptr, tiles.MOMENTUM, offset, new_momentum, exists, "fp32", VECTOR)
    tiles.store(row_ptr, tiles.HESS, offset, new_hess, exists, "fp32", VECTOR)
    tiles.store(row_ptr, tiles.PARAM, offset, new_mean, exists, DTYPE, VECTOR)
    if DTYPE != "fp32":
        tiles.store(row_ptr, tiles.MEAN, offset, new_mean, exists, "fp32", VECTOR)
    lines = tl.reshape((exists & active & (finite == 0)).to(tl.int32), (TILE // tiles.LANES, tiles.LANES))
    skipped = tl.sum(lines, 1)  # [TILE / LANES]: a warp's own, so that none waits for another

    score = tl.zeros((TILE,), tl.float32)
    if FLAGS.SENSITIVITY:  # noqa: SIM102 - known when compiling, the next one is not
        if tl.load(row_ptr + tiles.SENSITIVITY) != 0:
            sensitivity = tiles.load(row_ptr, tiles.SENSITIVITY, offset, exists, "fp32", VECTOR)
            uncertainty = tiles.load(row_ptr, tiles.UNCERTAINTY, offset, exists, "fp32", VECTOR)
            sensitivity, uncertainty = formulas.update_sensitivity(new_mean, observed, sensitivity, uncertainty)
            tiles.store(row_ptr, tiles.SENSITIVITY, offset, sensitivity, exists, "fp32", VECTOR)
            tiles.store(row_ptr, tiles.UNCERTAINTY, offset, uncertainty, exists, "fp32", VECTOR)
            if CRITERION == "sensitivity":
                score = sensitivity * uncertainty
    if CRITERION != "" and CRITERION != "sensitivity":
        score = formulas.importance(new_mean, new_hess, tl.load(hyper_ptr + formulas.ESS), weight_decay, CRITERION)
    return skipped, score
