"""From the sums of the scores to masks: score of every rank, the best `budget` of them, and zeros where a rank lost.

A score's bit pattern, read as an integer, orders like the score itself, because scores are not negative; a NaN comes
out on top, as it should: a rank of unknown worth is kept. The budget-th largest is found by bisection over the 31 bits,
with plain loads and compares only, and ties go to the lowest index.
"""

import triton
import triton.language as tl

from ivon_lora.kernels import sums, tiles

# Columns of the adapter table. The three tensors of an adapter (A, B, E) follow each other; an absent one has slot -1.
FIRST = tl.constexpr(0)  # index of the adapter's first rank among all ranks
RANKS = tl.constexpr(1)
TENSORS = tl.constexpr(2)  # first column of the first tensor
SLOT = tl.constexpr(0)  # first slot among the sums
COUNT = tl.constexpr(1)  # elements per rank
SCORES = tl.constexpr(2)  # address of the scores: fp32 (r,)
MASK = tl.constexpr(3)  # address of the mask: bool (r,)
TENSOR_COLUMNS = tl.constexpr(4)
FINISHED = tl.constexpr(14)  # tiles of the adapter that are through; 0 between two launches
ADAPTER_COLUMNS = tl.constexpr(15)

#: key of a rank that is kept whatever its score: above every bit pattern of a score
GRANTED = tl.constexpr(0x7FFFFFFF)

# Columns of the selection's scalars.
N_RANKS = tl.constexpr(0)
N_SLOTS = tl.constexpr(1)
BUDGET = tl.constexpr(2)
MIN_RANK = tl.constexpr(3)
SELECTION_COLUMNS = tl.constexpr(4)


@triton.jit
def _score_block(start, stop, score_sums, adapters, owners, keys, selection, FROZEN: tl.constexpr, BLOCK: tl.constexpr):
    """Scores of BLOCK ranks from `start` on, below `stop`: into the adapters' tensors, and as keys; clears the sums."""
    n_slots = tl.load(selection + N_SLOTS)
    rank = start + tl.arange(0, BLOCK)
    exists = rank < stop
    adapter = adapters + tl.load(owners + rank, mask=exists, other=0) * ADAPTER_COLUMNS
    k = rank - tl.load(adapter + FIRST, mask=exists, other=0)
    score = tl.zeros((BLOCK,), tl.float32)
    for i in range(3):  # a loop when it runs, too: a division of 320 bits takes registers and code
        tensor = adapter + (TENSORS + i * TENSOR_COLUMNS)
        slot = tl.load(tensor + SLOT, mask=exists, other=-1)
        present = slot >= 0
        slot += k
        count = tl.load(tensor + COUNT, mask=present, other=1)
        score = tl.where(present, score + sums.mean(score_sums, slot, n_slots, count, present), score)
        tl.debug_barrier()  # where there are more threads than ranks, several warps read the same sums
        for row in tl.static_range(sums.ROWS):
            tl.store(score_sums + row * n_slots + slot, tl.zeros_like(slot), mask=present)
    if FROZEN:
        mask = tl.load(adapter + (TENSORS + MASK), mask=exists, other=0).to(tl.pointer_type(tl.int8)) + k
        score = score * tl.load(mask, mask=exists, other=0).to(tl.float32)
    for i in tl.static_range(3):
        tensor = adapter + (TENSORS + i * TENSOR_COLUMNS)
        present = tl.load(tensor + SLOT, mask=exists, other=-1) >= 0
        to = tl.load(tensor + SCORES, mask=present, other=0).to(tl.pointer_type(tl.float32)) + k
        tl.store(to, score, mask=present)
    tl.store(keys + rank, score.to(tl.int32, bitcast=True), mask=exists)


@triton.jit
def _grant(n_ranks, min_rank, adapters, owners, keys, BLOCK: tl.constexpr):
    """Raise the keys of the best `min_rank` ranks of every adapter above all others.

    Keys are read from the first half of `keys` and written into the second.
    """
    start = n_ranks * 0
    while start < n_ranks:
        rank = start + tl.arange(0, BLOCK)
        exists = rank < n_ranks
        adapter = adapters + tl.load(owners + rank, mask=exists, other=0) * ADAPTER_COLUMNS
        first = tl.load(adapter + FIRST, mask=exists, other=0)
        r = tl.load(adapter + RANKS, mask=exists, other=0)
        key = tl.load(keys + rank, mask=exists, other=0)
        better = tl.zeros((BLOCK,), tl.int32)
        j = tl.max(r) * 0
        while j < tl.max(r):
            rival = tl.load(keys + first + j, mask=exists & (j < r), other=-1)
            better += ((rival > key) | ((rival == key) & (first + j < rank))).to(tl.int32)
            j += 1
        tl.store(keys + n_ranks + rank, tl.where(better < min_rank, GRANTED, key), mask=exists)
        start += BLOCK


@triton.jit
def _count(keys, n_ranks, threshold, BLOCK: tl.constexpr):
    """How many keys are at least `threshold`."""
    total = tl.zeros((BLOCK,), tl.int32)
    start = n_ranks * 0
    while start < n_ranks:
        rank = start + tl.arange(0, BLOCK)
        total += (tl.load(keys + rank, mask=rank < n_ranks, other=-1) >= threshold).to(tl.int32)
        start += BLOCK
    return tl.sum(total)


@triton.jit
def _score(start, stop, score_sums, adapters, owners, keys, selection, BLOCK: tl.constexpr):
    while start < stop:
        _score_block(start, stop, score_sums, adapters, owners, keys, selection, False, BLOCK)
        start += BLOCK


@triton.jit
def _select(adapters, owners, keys, selection, BLOCK: tl.constexpr):
    """Write the masks of the best `budget` ranks by their keys: the work of one program."""
    n_ranks, budget = tl.load(selection + N_RANKS), tl.load(selection + BUDGET)
    min_rank = tl.load(selection + MIN_RANK)
    if min_rank > 0:
        _grant(n_ranks, min_rank, adapters, owners, keys, BLOCK)
        tl.debug_barrier()
    keys += tl.where(min_rank > 0, n_ranks, 0)
    threshold = tl.sum(tl.zeros((BLOCK,), tl.int32))
    bit = threshold + 30
    while bit >= 0:
        candidate = threshold | (1 << bit)
        threshold = tl.where(_count(keys, n_ranks, candidate, 2 * BLOCK) >= budget, candidate, threshold)
        bit -= 1
    # how many of those that equal the threshold are kept; there is no key above the highest
    above = tl.where(threshold == GRANTED, 0, _count(keys, n_ranks, threshold + 1, 2 * BLOCK))
    ties = budget - above
    start = n_ranks * 0
    while start < n_ranks:
        rank = start + tl.arange(0, BLOCK)
        exists = rank < n_ranks
        key = tl.load(keys + rank, mask=exists, other=-1)
        tied = (key == threshold).to(tl.int32)
        kept = (key > threshold) | ((tied != 0) & (tl.cumsum(tied) - tied < ties))
        ties -= tl.sum(tied)
        adapter = adapters + tl.load(owners + rank, mask=exists, other=0) * ADAPTER_COLUMNS
        k = rank - tl.load(adapter + FIRST, mask=exists, other=0)
        for i in tl.static_range(3):
            tensor = adapter + (TENSORS + i * TENSOR_COLUMNS)
            present = tl.load(tensor + SLOT, mask=exists, other=-1) >= 0
            to = tl.load(tensor + MASK, mask=present, other=0).to(tl.pointer_type(tl.int8)) + k
            tl.store(to, kept.to(tl.int8), mask=present)
        start += BLOCK


@triton.jit
def finish_tile(
    row, score_sums, done, adapters, owners, keys, selection, SCORE_BLOCK: tl.constexpr, BLOCK: tl.constexpr
):
    """After the scores of a tile: the last one of an adapter scores its ranks, the last of all selects.

    row: of the tile's tensor.  done: int32, tiles that need nothing more, 0 before and after the launch.
    """
    tl.debug_barrier()  # every warp has added its part; some versions of Triton put no barrier before an atomic
    number, n_finished = tl.load(row + tiles.ADAPTER), tl.load(row + tiles.ADAPTER_TILES)
    if number >= 0:
        adapter = adapters + number * ADAPTER_COLUMNS
        if tl.atomic_add(adapter + FINISHED, 1, sem="acq_rel", scope="gpu") == n_finished - 1:
            tl.debug_barrier()
            first = tl.load(adapter + FIRST)
            stop = first + tl.load(adapter + RANKS)
            _score(first, stop, score_sums, adapters, owners, keys, selection, SCORE_BLOCK)
            tl.store(adapter + FINISHED, 0)
            tl.debug_barrier()
        else:
            n_finished *= 0
    if n_finished > 0:
        n_done = tl.atomic_add(done, n_finished.to(tl.int32), sem="acq_rel", scope="gpu") + n_finished
        if n_done == tl.num_programs(0):
            tl.debug_barrier()
            _select(adapters, owners, keys, selection, BLOCK)
            tl.store(done, 0)


@triton.jit
def score_kernel(score_sums, adapters, owners, keys, selection, FROZEN: tl.constexpr, BLOCK: tl.constexpr):
    """Scores only: one program per BLOCK ranks.

    score_sums: int64 [sums.ROWS, n_slots], cleared.  adapters: int64 [n, ADAPTER_COLUMNS].  owners: int64 [n_ranks],
    the adapter of each rank.  keys: int32 [2 n_ranks], scratch.  selection: int64 [SELECTION_COLUMNS].  FROZEN: the
    score of a pruned rank is 0.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    stop = tl.load(selection + N_RANKS)
    _score_block(start, stop, score_sums, adapters, owners, keys, selection, FROZEN, BLOCK)


@triton.jit
def select_kernel(score_sums, adapters, owners, keys, selection, SCORE_BLOCK: tl.constexpr, BLOCK: tl.constexpr):
    """Scores and masks, in one program. Arguments as in `score_kernel`."""
    n_ranks = tl.load(selection + N_RANKS)
    _score(n_ranks * 0, n_ranks, score_sums, adapters, owners, keys, selection, SCORE_BLOCK)
    tl.debug_barrier()
    _select(adapters, owners, keys, selection, BLOCK)


@triton.jit
def zero_kernel(tensors, items, TILE: tl.constexpr, DTYPE: tl.constexpr, MEAN_STATE: tl.constexpr):
    """Mean and momentum 0 where the rank mask is False: one tile of the work list."""
    item = items + tl.program_id(0).to(tl.int64) * tiles.ITEM_COLUMNS
    row = tensors + tl.load(item + tiles.ITEM_TENSOR) * tiles.TENSOR_COLUMNS
    offsets, exists, _ = tiles.lanes(item, row, TILE, False)
    dead = exists & (tiles.active(item, row, exists, TILE, False) == 0)
    zero = tl.zeros((TILE,), tl.float32)
    tiles.store(tiles.anything(row, tiles.PARAM, DTYPE, False), offsets, zero, dead, DTYPE)
    tiles.store(tiles.floats(row, tiles.MOMENTUM, False), offsets, zero, dead, 0)
    if MEAN_STATE:
        tiles.store(tiles.floats(row, tiles.MEAN, False), offsets, zero, dead, 0)
