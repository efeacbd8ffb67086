"""Scores of ranks, and which ranks stay.

Three launches, of which the first is only needed where a step has not added up the scores on its way:

    importance_kernel   one program per tile: adds the importance of the elements to the sums of their ranks
    score_kernel        one program per adapter: means of the ranks of its tensors (A, B, E), added up; sums cleared
    select_kernel       one program per adapter, or several: masks of the best ranks, zeros where a rank has lost

Ranks compete by keys that differ. The score comes first (its bit pattern orders like itself, because scores are not
negative), then the place of the rank, so that of equal scores the first is larger; and above both stands a bit for
ranks that stay whatever their score. So the budget-th largest key is one number, and ranks with less than that lose.
The plain reference of the first kernel is `EagerBackend.rank_means`, of the others `functional.importance.select_top`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from ivon_lora.kernels import formulas, runtime, sums, tiles
from ivon_lora.kernels.table import on_device

# The numbers of a ranking: these, then the adapters one after another.
N_RANKS = tl.constexpr(0)
BUDGET = tl.constexpr(1)
MIN_RANK = tl.constexpr(2)
HEAD = tl.constexpr(4)

# Columns of an adapter. Its tensors (A, B, E) follow each other; an absent one has slot -1.
FIRST = tl.constexpr(0)  # number of the adapter's first rank among all ranks
RANKS = tl.constexpr(1)
TENSORS = tl.constexpr(2)  # first column of the first tensor
SLOT = tl.constexpr(0)  # of its first rank, among the sums
COUNT = tl.constexpr(1)  # elements per rank
SCORES = tl.constexpr(2)  # address of the scores: fp32 (r,)
MASK = tl.constexpr(3)  # address of the mask: bool (r,)
INNER = tl.constexpr(4)  # elements between two ranks
PARAM = tl.constexpr(5)  # address of the parameter, whose pruned ranks become 0; 0: they stay
PARAM_BYTES = tl.constexpr(6)  # of an element
MOMENTUM = tl.constexpr(7)
MEAN = tl.constexpr(8)  # address of the mean of a 16-bit parameter, or 0
TENSOR_COLUMNS = tl.constexpr(9)
ADAPTER_COLUMNS = tl.constexpr(29)

#: bits of a key: the place of the rank, the score, and one for ranks that stay whatever their score
PLACE_BITS = tl.constexpr(24)
LAST_PLACE = tl.constexpr((1 << 24) - 1)
GRANTED = tl.constexpr(1 << (24 + 31))
KEY_BITS = tl.constexpr(24 + 31 + 1)

#: keys that a program compares at once, and elements that it zeroes at once
BLOCK = tl.constexpr(1024)
#: elements of a tensor for each program that zeroes
SHARE = 1 << 16


@triton.jit(do_not_specialize=["n_slots"])
def importance_kernel(rows_ptr, items_ptr, hyper_ptr, key_ptr, sums_ptr, n_slots, FLAGS: tl.constexpr):
    """One tile, if its tensor has a slot. Arguments: as of `step_kernel`."""
    TILE: tl.constexpr = FLAGS.TILE
    row_ptr, hyper_ptr, start, length = tiles.locate(rows_ptr, items_ptr, hyper_ptr, formulas.N_HYPER)
    if tl.load(row_ptr + tiles.SLOT) >= 0:
        vector = tiles.is_vector(row_ptr, length)
        if vector:
            score = _importance_tile(row_ptr, hyper_ptr, start, length, FLAGS, True)
        else:
            score = _importance_tile(row_ptr, hyper_ptr, start, length, FLAGS, False)
        rank, change = tiles.tile_rank(items_ptr)
        sums.add(score, row_ptr, start, length, rank, change, vector, sums_ptr, n_slots, TILE)


@triton.jit
def _importance_tile(row_ptr, hyper_ptr, start, length, FLAGS: tl.constexpr, VECTOR: tl.constexpr):
    TILE: tl.constexpr = FLAGS.TILE
    CRITERION: tl.constexpr = FLAGS.CRITERION
    exists = tiles.existing(row_ptr, start, length, TILE, VECTOR)  # [TILE], as all blocks here
    offset = tiles.offsets(row_ptr, start, TILE, VECTOR)
    if CRITERION == "sensitivity":
        score = tiles.load(row_ptr, tiles.SENSITIVITY, offset, exists, "fp32", VECTOR)
        score *= tiles.load(row_ptr, tiles.UNCERTAINTY, offset, exists, "fp32", VECTOR)
    else:
        mean = tiles.load(row_ptr, tiles.MEAN, offset, exists, "fp32", VECTOR)
        hess = tiles.load(row_ptr, tiles.HESS, offset, exists, "fp32", VECTOR)
        weight_decay = tl.load(hyper_ptr + formulas.WEIGHT_DECAY)
        score = formulas.importance(mean, hess, tl.load(hyper_ptr + formulas.ESS), weight_decay, CRITERION)
    return score


@triton.jit(do_not_specialize=["n_slots"])
def score_kernel(adapters_ptr, sums_ptr, n_slots, keys_ptr, FROZEN: tl.constexpr, R: tl.constexpr):
    """Scores and keys of the ranks of one adapter, of which there are at most R.

    adapters_ptr: int64, see above.  sums_ptr: int64 [sums.ROWS, n_slots].  keys_ptr: int64 [n_ranks].  FROZEN: the
    score of a masked rank is 0.
    """
    adapter_ptr = adapters_ptr + HEAD + tl.program_id(0) * ADAPTER_COLUMNS
    first, n_ranks = tl.load(adapter_ptr + FIRST), tl.load(adapter_ptr + RANKS)
    rank = tl.arange(0, R)  # [R], as all blocks here
    exists = rank < n_ranks
    score = tl.zeros((R,), tl.float32)
    for i in range(3):
        tensor_ptr = adapter_ptr + TENSORS + i * TENSOR_COLUMNS
        if tl.load(tensor_ptr + SLOT) >= 0:
            slot_ptr = sums_ptr + tl.load(tensor_ptr + SLOT) + rank
            count = tl.zeros((R,), tl.int64) + tl.load(tensor_ptr + COUNT)
            score += sums.mean(slot_ptr, n_slots, count, exists)
            tl.debug_barrier()  # of fewer ranks than threads, several threads read what one of them clears
            sums.clear(slot_ptr, n_slots, exists)
    if FROZEN:
        mask_ptr = tl.load(adapter_ptr + TENSORS + MASK).to(tl.pointer_type(tl.int8))
        score = tl.where(tl.load(mask_ptr + rank, mask=exists, other=0) != 0, score, 0.0)
    for i in range(3):
        tensor_ptr = adapter_ptr + TENSORS + i * TENSOR_COLUMNS
        scores_ptr = tl.load(tensor_ptr + SCORES).to(tl.pointer_type(tl.float32))
        if tl.load(tensor_ptr + SLOT) >= 0:
            tl.store(scores_ptr + rank, score, mask=exists)

    pattern = tl.where(score == score, score.to(tl.int32, bitcast=True), 0x7FC00000)  # one NaN, above all numbers
    key = pattern.to(tl.int64) << PLACE_BITS | (LAST_PLACE - first - rank)
    key = tl.where(exists, key, -1)
    min_rank = tl.load(adapters_ptr + MIN_RANK)
    if min_rank > 0:
        n_better = tl.zeros((R,), tl.int32)
        for i in range(n_ranks.to(tl.int32)):
            n_better += (tl.max(tl.where(rank == i, key, -1)) > key).to(tl.int32)
        key = tl.where(n_better < min_rank, key | GRANTED, key)
    tl.store(keys_ptr + first + rank, key, mask=exists)


@triton.jit
def _largest_key(keys_ptr, n_keys, number):
    """The `number`-th largest key, by bisection; above all keys for 0."""
    threshold = number * 0
    for i in range(KEY_BITS):
        candidate = threshold | (threshold * 0 + 1 << (KEY_BITS - 1 - i))
        n_above = tl.zeros((BLOCK,), tl.int32)
        for begin in range(0, n_keys, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            n_above += (tl.load(keys_ptr + at, mask=at < n_keys, other=-1) >= candidate).to(tl.int32)
        threshold = tl.where(tl.sum(n_above) >= number, candidate, threshold)
    return threshold


@triton.jit
def select_kernel(adapters_ptr, keys_ptr):
    """The masks of one adapter, and zeros where a rank has lost; program_id(1) counts those that share this.

    Every program finds the same threshold for itself: it takes less time than waiting for one that does. Arguments: as
    of `score_kernel`.
    """
    threshold = _largest_key(keys_ptr, tl.load(adapters_ptr + N_RANKS).to(tl.int32), tl.load(adapters_ptr + BUDGET))
    adapter_ptr = adapters_ptr + HEAD + tl.program_id(0) * ADAPTER_COLUMNS
    keys_ptr += tl.load(adapter_ptr + FIRST)
    n_ranks = tl.load(adapter_ptr + RANKS)
    for i in range(3):
        tensor_ptr = adapter_ptr + TENSORS + i * TENSOR_COLUMNS
        if (tl.load(tensor_ptr + SLOT) >= 0) & (tl.program_id(1) == 0):
            mask_ptr = tl.load(tensor_ptr + MASK).to(tl.pointer_type(tl.int8))
            for begin in range(0, n_ranks.to(tl.int32), BLOCK):
                rank = begin + tl.arange(0, BLOCK)
                stays = tl.load(keys_ptr + rank, mask=rank < n_ranks, other=0) >= threshold
                tl.store(mask_ptr + rank, stays.to(tl.int8), mask=rank < n_ranks)
        if tl.load(tensor_ptr + PARAM) != 0:
            _zero(tensor_ptr, keys_ptr, n_ranks, threshold)


@triton.jit
def _zero(tensor_ptr, keys_ptr, n_ranks, threshold):
    """Zeros in the parameter, the momentum and the mean where a rank has lost."""
    inner = tl.load(tensor_ptr + INNER)
    numel = tl.load(tensor_ptr + COUNT) * n_ranks
    ranks_reciprocal, inner_reciprocal = 0xFFFFFFFF // n_ranks, 0xFFFFFFFF // inner
    distance = tl.arange(0, BLOCK)
    begin = tl.program_id(1).to(tl.int64) * BLOCK
    while begin < numel:
        rank, change = tiles.rank_at(begin, n_ranks, inner, BLOCK)
        rank = tiles.ranks_behind(
            rank.to(tl.int32), change.to(tl.int32), distance, n_ranks, ranks_reciprocal, inner_reciprocal
        )
        exists = begin + distance < numel
        lost = exists & (tl.load(keys_ptr + rank, mask=exists, other=0) < threshold)
        zero = tl.zeros((BLOCK,), tl.float32)
        param = tl.load(tensor_ptr + PARAM)
        if tl.load(tensor_ptr + PARAM_BYTES) == 2:
            tl.store(param.to(tl.pointer_type(tl.int16)) + begin + distance, zero.to(tl.int16), mask=lost)
        else:
            tl.store(param.to(tl.pointer_type(tl.float32)) + begin + distance, zero, mask=lost)
        momentum_ptr = tl.load(tensor_ptr + MOMENTUM).to(tl.pointer_type(tl.float32))
        tl.store(momentum_ptr + begin + distance, zero, mask=lost)
        if tl.load(tensor_ptr + MEAN) != 0:
            tl.store(tl.load(tensor_ptr + MEAN).to(tl.pointer_type(tl.float32)) + begin + distance, zero, mask=lost)
        begin += tl.num_programs(1).to(tl.int64) * BLOCK


class RankSums:
    """Where the scores of ranks add up, and the numbers of the adapters that they are of, on the device.

    Args:
        adapters: for each adapter its number of ranks, and the indices of the parameters that it is made of.

    Attributes:
        slots: index of a parameter -> the slot of its first rank.
        sums: int64 (sums.ROWS, n_slots), zeros between two rankings.

    Raises:
        ValueError: there are too many ranks.
    """

    def __init__(self, adapters: Sequence[tuple[int, Sequence[int]]], device: torch.device) -> None:
        self.adapters = adapters
        self.slots: dict[int, int] = {}
        n_slots = 0
        for r, indices in adapters:
            for index in indices:
                self.slots[index] = n_slots
                n_slots += r
        self._n_ranks = sum(r for r, _ in adapters)
        if self._n_ranks > LAST_PLACE.value:
            raise ValueError(f"{self._n_ranks} ranks are too many for one ranking: at most {LAST_PLACE.value}")
        self.sums = torch.zeros(sums.ROWS.value, n_slots, dtype=torch.int64, device=device)
        self._keys = torch.empty(self._n_ranks, dtype=torch.int64, device=device)

    def score(self, tensors: Sequence[Sequence[list[int]]], budget: int, min_rank: int, frozen: bool) -> None:
        """Write the scores, and clear the sums.

        Args:
            tensors: for each adapter and each of its parameters the columns from COUNT on.
        """
        head, rows, first = [self._n_ranks, budget, min_rank, 0], [], 0
        for (r, indices), columns in zip(self.adapters, tensors, strict=True):
            row = [first, r]
            for index, of_tensor in zip(indices, columns, strict=True):
                row += [self.slots[index], *of_tensor]
            rows.append(row + [-1, *[0] * (TENSOR_COLUMNS.value - 1)] * (3 - len(indices)))
            first += r
        self._numbers = on_device(np.array([*head, *(x for row in rows for x in row)], np.int64), self.sums.device)
        lanes = triton.next_power_of_2(max(r for r, _ in self.adapters))
        arguments = self._numbers, self.sums, self.sums.shape[1], self._keys
        num_warps = min(max(lanes // 32, 1), 8)
        runtime.run(score_kernel, (len(rows),), *arguments, FROZEN=frozen, R=lanes, num_warps=num_warps)

    def select(self, largest: int) -> None:
        """Write the masks, and zeros where a rank has lost; ``largest``: elements of the largest tensor."""
        grid = len(self.adapters), max(-(-largest // SHARE), 1)
        runtime.run(select_kernel, grid, self._numbers, self._keys, num_warps=4)
