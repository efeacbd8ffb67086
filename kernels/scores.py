"""The scores of all ranks from the posterior, or the running means, as they are, without a step."""

import triton
import triton.language as tl

from ivon_lora.kernels import formulas, sums, tiles


@triton.jit
def _score_tile(
    item, row, batch, score_sums, n_slots, TILE: tl.constexpr, CRITERION: tl.constexpr, VECTOR: tl.constexpr
):
    offsets, exists, _ = tiles.lanes(item, row, TILE, VECTOR)
    if CRITERION == 5:
        sensitivity = tiles.load(tiles.floats(row, tiles.SENSITIVITY, VECTOR), offsets, exists, 0)
        score = sensitivity * tiles.load(tiles.floats(row, tiles.UNCERTAINTY, VECTOR), offsets, exists, 0)
    else:
        mean = tiles.load(tiles.floats(row, tiles.MEAN, VECTOR), offsets, exists, 0)
        hess = tiles.load(tiles.floats(row, tiles.HESS, VECTOR), offsets, exists, 0)
        ess, weight_decay = tiles.scalar(batch, tiles.ESS), tiles.weight_decay(row, batch)
        score = formulas.importance(CRITERION, mean, hess, ess, weight_decay)
    sums.accumulate(score, exists, item, row, score_sums, n_slots, TILE, VECTOR)


@triton.jit(do_not_specialize=["n_slots"])
def importance_kernel(
    tensors, items, scalars, score_sums, n_slots, TILE: tl.constexpr, CRITERION: tl.constexpr
):  # fmt: skip
    """One tile of the work list. Arguments as in `step_kernel`, all of whose tensors have a slot here."""
    item = items + tl.program_id(0).to(tl.int64) * tiles.ITEM_COLUMNS
    row = tensors + tl.load(item + tiles.ITEM_TENSOR) * tiles.TENSOR_COLUMNS
    if tl.load(item + tiles.ITEM_KIND) == tiles.SCATTERED:
        _score_tile(item, row, scalars, score_sums, n_slots, TILE, CRITERION, False)
    else:
        _score_tile(item, row, scalars, score_sums, n_slots, TILE, CRITERION, True)
