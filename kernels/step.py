"""One step of IVON for every parameter of a launch; scores of ranks and moments for priors add up on the way."""

import triton
import triton.language as tl

from ivon_lora.kernels import formulas, prior, select, sums, tiles
from ivon_lora.kernels.formulas import draw_sample
from ivon_lora.kernels.sample import tile_normals


@triton.jit
def _curvature(grad, hess, quads, row, batch, TILE: tl.constexpr, CURVATURE: tl.constexpr):
    """ghat eps / sigma (CURVATURE 1, regenerating eps), or a multiple of ghat^2 (CURVATURE 2 and 3)."""
    if CURVATURE == 1:
        ess, weight_decay = tiles.scalar(batch, tiles.ESS), tiles.weight_decay(row, batch)
        root = formulas.root_precision(hess, ess, weight_decay)
        curvature = grad * (tile_normals(quads, row, batch, TILE) * root)
    else:
        curvature = (grad * grad) * tiles.scalar(batch, tiles.SQUARE_SCALE)
    return curvature


@triton.jit
def _bank_tile(
    item, row, batch, TILE: tl.constexpr, GRAD_DTYPE: tl.constexpr, CURVATURE: tl.constexpr, VECTOR: tl.constexpr
):
    offsets, exists, quads = tiles.lanes(item, row, TILE, VECTOR)
    grad = tiles.load(tiles.anything(row, tiles.GRAD, GRAD_DTYPE, VECTOR), offsets, exists, GRAD_DTYPE)
    hess = tiles.load(tiles.floats(row, tiles.HESS, VECTOR), offsets, exists, 0)
    curvature = _curvature(grad, hess, quads, row, batch, TILE, CURVATURE)
    to_grad = tiles.floats(row, tiles.BANKED_GRAD, VECTOR)
    to_curvature = tiles.floats(row, tiles.BANKED_CURVATURE, VECTOR)
    tiles.store(to_grad, offsets, tiles.load(to_grad, offsets, exists, 0) + grad, exists, 0)
    tiles.store(to_curvature, offsets, tiles.load(to_curvature, offsets, exists, 0) + curvature, exists, 0)


@triton.jit
def bank_kernel(tensors, items, scalars, TILE: tl.constexpr, GRAD_DTYPE: tl.constexpr, CURVATURE: tl.constexpr):
    """Add the gradient, and the curvature it implies, to the banked sums: one tile of the work list."""
    item = items + tl.program_id(0).to(tl.int64) * tiles.ITEM_COLUMNS
    row = tensors + tl.load(item + tiles.ITEM_TENSOR) * tiles.TENSOR_COLUMNS
    if tl.load(item + tiles.ITEM_KIND) == tiles.SCATTERED:
        _bank_tile(item, row, scalars, TILE, GRAD_DTYPE, CURVATURE, False)
    else:
        _bank_tile(item, row, scalars, TILE, GRAD_DTYPE, CURVATURE, True)


@triton.jit
def _step_tile(
    item, row, batch, nonfinite, score_sums, n_slots, TILE: tl.constexpr, DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr, CURVATURE: tl.constexpr, ADAM: tl.constexpr, BANKED: tl.constexpr, MASKED: tl.constexpr,
    MEAN_STATE: tl.constexpr, REREAD: tl.constexpr, CRITERION: tl.constexpr, SCORED: tl.constexpr,
    PRIOR: tl.constexpr, NEXT_SAMPLE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    offsets, exists, quads = tiles.lanes(item, row, TILE, VECTOR)
    ess, weight_decay = tiles.scalar(batch, tiles.ESS), tiles.weight_decay(row, batch)
    param = tiles.anything(row, tiles.PARAM, DTYPE, VECTOR)
    momentum_at = tiles.floats(row, tiles.MOMENTUM, VECTOR)
    hess_at = tiles.floats(row, tiles.HESS, VECTOR)
    mean_at = tiles.floats(row, tiles.MEAN, VECTOR)

    observed = tiles.load(tiles.anything(row, tiles.GRAD, GRAD_DTYPE, VECTOR), offsets, exists, GRAD_DTYPE)
    hess = tiles.load(hess_at, offsets, exists, 0)
    momentum = tiles.load(momentum_at, offsets, exists, 0)
    mean = tiles.load(mean_at, offsets, exists, 0)
    if REREAD:
        written = tiles.load(param, offsets, exists, DTYPE)
        mean = tl.where(tiles.rounded(mean, DTYPE) == written, mean, written)
    grad = observed
    new_hess = hess
    if CURVATURE != 0:
        curvature = _curvature(grad, hess, quads, row, batch, TILE, CURVATURE)
        if BANKED:
            n_samples = tl.zeros_like(grad) + tiles.scalar(batch, tiles.N_SAMPLES)
            banked_grad = tiles.load(tiles.floats(row, tiles.BANKED_GRAD, VECTOR), offsets, exists, 0)
            banked_curvature = tiles.load(tiles.floats(row, tiles.BANKED_CURVATURE, VECTOR), offsets, exists, 0)
            grad = tl.div_rn(grad + banked_grad, n_samples)
            curvature = tl.div_rn(curvature + banked_curvature, n_samples)
        rho = tiles.scalar(batch, tiles.RHO)
        if CURVATURE == 3:
            new_hess = formulas.average_curvature(hess, curvature, rho)
        else:
            new_hess = formulas.update_hessian(hess, curvature, weight_decay, rho)
    new_momentum = momentum * tiles.scalar(batch, tiles.BETA1) + grad * tiles.scalar(batch, tiles.BETA1_COMPLEMENT)
    new_mean = formulas.update_mean(
        mean, new_momentum, new_hess, weight_decay, tiles.scalar(batch, tiles.LR),
        tiles.scalar(batch, tiles.CLIP_RADIUS), tiles.scalar(batch, tiles.DEBIAS),
        tiles.scalar(batch, tiles.INVERSE_BATCH), tiles.scalar(batch, tiles.PRIOR_WEIGHT), ADAM,
    )  # fmt: skip

    finite = formulas.is_finite(new_momentum) & formulas.is_finite(new_mean)
    moved = finite
    active = finite
    if MASKED:
        active = tiles.active(item, row, exists, TILE, VECTOR)
        moved = finite & active
    new_mean = tl.where(moved, new_mean, mean)
    new_hess = tl.where(moved, new_hess, hess)
    tiles.store(momentum_at, offsets, tl.where(moved, new_momentum, momentum), exists, 0)
    tiles.store(hess_at, offsets, new_hess, exists, 0)
    if MEAN_STATE:
        tiles.store(mean_at, offsets, new_mean, exists, 0)
    if NEXT_SAMPLE:
        if not MEAN_STATE:
            tiles.store(tiles.floats(row, tiles.MEAN_OUT, VECTOR), offsets, new_mean, exists, 0)
        following = batch + tiles.SCALAR_COLUMNS
        eps = tile_normals(quads, row, following, TILE)
        if MASKED:
            eps = tl.where(active, eps, 0.0)
        next_ess, next_decay = tiles.scalar(following, tiles.NOISE_ESS), tiles.weight_decay(row, following)
        theta = draw_sample(new_mean, new_hess, eps, next_ess, next_decay)
        tiles.store(param, offsets, theta, exists, DTYPE)
    else:
        tiles.store(param, offsets, new_mean, exists, DTYPE)
    if CRITERION != 0:
        exists = tiles.existing(item, TILE, VECTOR)  # found again, not kept: registers are scarce up to here
    # One number per thread, so that none waits for others; fp32, as compilers pack truth values into bits, in memory.
    skipped = tl.sum(tl.reshape(tl.where(exists & (finite == 0), 1.0, 0.0), (TILE // 4, 4)), 1)
    counters = nonfinite + tl.zeros_like(skipped).to(tl.int64)
    tl.atomic_add(counters, skipped.to(tl.int32).to(tl.int64), mask=skipped > 0, sem="relaxed")

    if PRIOR:  # before the scores, which need more registers
        live_hess = new_hess
        if MASKED:
            live_hess = tl.where(active, new_hess, 0.0)  # ranks pruned for good say nothing
        prior.add_moments(new_mean, live_hess, exists, row, batch)
    if CRITERION != 0:  # noqa: SIM102 - known when compiling, the next one is not
        if tl.load(row + tiles.SLOT) >= 0:
            if CRITERION == 5:
                sensitivity_at = tiles.floats(row, tiles.SENSITIVITY, VECTOR)
                uncertainty_at = tiles.floats(row, tiles.UNCERTAINTY, VECTOR)
                sensitivity = tiles.load(sensitivity_at, offsets, exists, 0)
                uncertainty = tiles.load(uncertainty_at, offsets, exists, 0)
                new_s, new_u = formulas.update_sensitivity(new_mean, observed, sensitivity, uncertainty)
                sensitivity = tl.where(formulas.is_finite(observed), new_s, sensitivity)
                uncertainty = tl.where(formulas.is_finite(observed), new_u, uncertainty)
                tiles.store(sensitivity_at, offsets, sensitivity, exists, 0)
                tiles.store(uncertainty_at, offsets, uncertainty, exists, 0)
                score = sensitivity * uncertainty
            else:
                score = formulas.importance(CRITERION, new_mean, new_hess, ess, weight_decay)
            if SCORED:
                sums.accumulate(score, exists, item, row, score_sums, n_slots, TILE, VECTOR)


@triton.jit(do_not_specialize=["n_slots"])
def step_kernel(
    tensors, items, scalars, nonfinite, score_sums, n_slots, done, adapters, owners, keys, selection,
    TILE: tl.constexpr, DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, CURVATURE: tl.constexpr, ADAM: tl.constexpr,
    BANKED: tl.constexpr, MASKED: tl.constexpr, MEAN_STATE: tl.constexpr, REREAD: tl.constexpr,
    CRITERION: tl.constexpr, SCORED: tl.constexpr, SELECT: tl.constexpr, PRIOR: tl.constexpr,
    NEXT_SAMPLE: tl.constexpr, SCORE_BLOCK: tl.constexpr, SELECT_BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of the work list.

    tensors, items, scalars: int64 tables, see `tiles`.  nonfinite: int64, counts the elements that were skipped.
    score_sums: int64 [sums.ROWS, n_slots].  DTYPE, GRAD_DTYPE: of the parameters and of the gradients.  CURVATURE: 0
    none (there was no sample: the Hessian stays), 1 "price", 2 "gradsq", 3 "fisher".  ADAM: the step rule is "adam".
    BANKED: there are earlier samples.  MASKED: some tensor has a hard rank mask.  MEAN_STATE: the new mean also goes to
    MEAN (16-bit parameters).
    REREAD: as in `sample_kernel`.  CRITERION: of the scores, see `formulas`; 0: none, nor running means.
    SCORED: scores are added up, not only running means updated.
    SELECT: the programs that finish last also score and select the ranks (`select`), for which all scored tensors must
    be in this launch.  PRIOR: tensors with `MOMENTS` get
    another delta where the scalars say so, for which all tiles of each must be in this launch.
    NEXT_SAMPLE: the parameter receives the sample that the second row of the scalars gives, and MEAN_OUT (MEAN, of
    16-bit parameters) the new mean.
    """
    item = items + tl.program_id(0).to(tl.int64) * tiles.ITEM_COLUMNS
    row = tensors + tl.load(item + tiles.ITEM_TENSOR) * tiles.TENSOR_COLUMNS
    if tl.load(item + tiles.ITEM_KIND) == tiles.SCATTERED:
        _step_tile(
            item, row, scalars, nonfinite, score_sums, n_slots, TILE, DTYPE, GRAD_DTYPE, CURVATURE, ADAM, BANKED,
            MASKED, MEAN_STATE, REREAD, CRITERION, SCORED, PRIOR, NEXT_SAMPLE, False,
        )  # fmt: skip
    else:
        _step_tile(
            item, row, scalars, nonfinite, score_sums, n_slots, TILE, DTYPE, GRAD_DTYPE, CURVATURE, ADAM, BANKED,
            MASKED, MEAN_STATE, REREAD, CRITERION, SCORED, PRIOR, NEXT_SAMPLE, True,
        )  # fmt: skip
    if PRIOR:
        prior.finish_tile(row, scalars)
    if SELECT:
        select.finish_tile(
            row, score_sums, done, adapters, owners, keys, selection, SCORE_BLOCK, SELECT_BLOCK
        )  # fmt: skip
