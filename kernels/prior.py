"""The width of each tensor's prior, chosen by the posterior that a step leaves: `ivon_lora.prior` within the launch.

Every tile adds the second moments of its elements to the sum of its tensor, exactly (`sums`), and the program that
finishes a tensor last turns the sum into the delta of the next step. No tile reads the new one too early: all of this
tensor are through. Whether a step does that is a number on the device, so a recorded launch is right in every step.
"""

import triton
import triton.language as tl

from ivon_lora.kernels import formulas, sums, tiles

#: where, among the numbers of the first stripe of a sum, finished tiles are counted; 0 between two launches
FINISHED = tl.constexpr(31)


@triton.jit
def add_moments(mean, hess, exists, row, scalars):
    """The second moments of a tile, into the sum of its tensor, if the step is one that changes its delta."""
    moments = tl.load(row + tiles.MOMENTS)
    if (tl.load(scalars + tiles.PRIOR_DUE) != 0) & (moments != 0):
        ess, weight_decay = tiles.scalar(scalars, tiles.ESS), tiles.weight_decay(row, scalars)
        values = formulas.second_moment(mean, hess, ess, weight_decay)
        stripe = tl.program_id(0) % sums.STRIPES
        sums.accumulate_all(values, exists, moments.to(tl.pointer_type(tl.int64)), stripe)


@triton.jit
def finish_tile(row, scalars):
    """After a tile's `add_moments`: the last one of a tensor sets its delta."""
    address = tl.load(row + tiles.MOMENTS)
    if (tl.load(scalars + tiles.PRIOR_DUE) != 0) & (address != 0):
        moments = address.to(tl.pointer_type(tl.int64))
        tl.debug_barrier()  # every warp has added its part; some versions of Triton put no barrier before an atomic
        if tl.atomic_add(moments + FINISHED, 1, sem="acq_rel", scope="gpu") == tl.load(row + tiles.TILES) - 1:
            tl.debug_barrier()
            moment = sums.mean_of_all(moments, tl.load(row + tiles.NUMEL))
            ess = tiles.scalar(scalars, tiles.ESS)
            lowest, highest = tiles.scalar(scalars, tiles.LOWEST_DECAY), tiles.scalar(scalars, tiles.HIGHEST_DECAY)
            decay = formulas.next_weight_decay(moment, ess, lowest, highest)
            tl.store(tl.load(row + tiles.OWN_DECAY).to(tl.pointer_type(tl.float32)), decay)
            tl.debug_barrier()
            sums.clear_all(moments)
