"""Exact sums of non-negative fp32 numbers, and their quotient by a count rounded once.

A sum is kept as int64 numbers: windows 16 bits apart, of which each takes 32 bits of every addition (window w counts
units of 2^(16 w - 149)), and one more number that counts what is not finite; together they span all of fp32. A tile
adds up its mantissas in 64 bits, in units of the window where its smallest number lies, as far as they reach, which is
mostly all of them, else in several passes; the halves of each such sum are the additions to two windows. Integer
addition is associative, so neither the tiling nor the order of the atomic additions can change a bit, and no magnitude
is too small or too large. Up to 2^31 - 1 elements fit without overflow. The mean is a long division of the 320-bit
number, rounded to nearest even: the fp32 number nearest to the true mean.

The sums of all slots lie window by window: int64 [ROWS, n_slots].
"""

import triton
import triton.language as tl

from ivon_lora.kernels import tiles

#: the row that counts infinities in its low and NaNs in its high 32 bits; the two windows before it are always 0
SPECIAL = tl.constexpr(20)
ROWS = tl.constexpr(21)
#: position of what is not finite: an exponent of 255
NOT_FINITE = tl.constexpr(254)

#: Positions that one pass takes beyond that of its unit: 24 bits of mantissa, these, and the bits of the number of
#: elements are 63. Small tiles are those of up to 2^9 elements, others have up to 2^15, see `tiles.LARGEST`.
REACH_OF_SMALL, REACH = tl.constexpr(30), tl.constexpr(24)


@triton.jit
def add(values, row_ptr, start, length, rank, change, vector, sums_ptr, n_slots, TILE: tl.constexpr):
    """Add the non-negative values (fp32 [TILE]) of a tile to the sums of their ranks; rank, change: of
    `tiles.tile_rank`.  vector: of `tiles.is_vector`, a number here, as two copies of this code would be too long.
    """
    lane = tl.arange(0, TILE)
    line = tl.where(vector, tl.load(row_ptr + tiles.LINE).to(tl.int32), tiles.LANES)
    distance = (lane >> 7) * line + (lane & (tiles.LANES - 1))
    exists = (distance < length) & ((lane & (tiles.LANES - 1)) < line) & (start + distance >= 0)
    pattern = tl.where(exists, values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    exponent, fraction = pattern >> 23, pattern & 0x7FFFFF
    # Each value is mantissa 2^(position - 149).
    mantissa = tl.where(exponent > 0, fraction | 0x800000, fraction)
    position = tl.maximum(exponent, 1) - 1
    reach: tl.constexpr = REACH_OF_SMALL if TILE <= 512 else REACH
    first, last = tl.min(tl.where(mantissa == 0, NOT_FINITE, position)), tl.max(position)
    slot_ptr = sums_ptr + tl.load(row_ptr + tiles.SLOT)
    while first <= last:
        finite = first < NOT_FINITE
        window = tl.where(finite, first >> 4, SPECIAL)
        unit = (first >> 4) << 4
        stop = tl.where(finite, tl.minimum(unit + reach + 1, NOT_FINITE), NOT_FINITE + 1)
        shift = tl.where(finite, position - unit, tl.where(mantissa == 0x800000, 0, 32))
        part = tl.where(finite, mantissa, 1)  # what is not finite counts: an infinity 1, a NaN 2^32
        part = tl.where((position >= first) & (position < stop), part, 0).to(tl.int64) << (shift & 63).to(tl.int64)
        _add_part(part, slot_ptr + window * n_slots, n_slots, finite, row_ptr, rank, change, line, TILE)
        first = stop


@triton.jit
def _add_part(part, slot_ptr, n_slots, finite, row_ptr, rank, change, line, TILE: tl.constexpr):
    """Add non-negative int64 numbers [TILE] to one window of their ranks, and what exceeds 32 bits to another one."""
    kind = tl.load(row_ptr + tiles.KIND)
    if kind == tiles.ONE_RANK:
        _add_atomically(tl.sum(part), slot_ptr + rank, n_slots, finite)
    elif (kind == tiles.PERIODIC) & (line == tl.load(row_ptr + tiles.LINE)):
        columns = tl.sum(tl.reshape(part, (TILE // tiles.LANES, tiles.LANES)), 0)  # [LANES]
        column_ranks = tiles.lane_ranks(row_ptr, rank, change, tl.arange(0, tiles.LANES))
        _add_atomically(columns, slot_ptr + column_ranks, n_slots, finite)
    else:
        lane = tl.arange(0, TILE)
        ranks = tiles.lane_ranks(row_ptr, rank, change, (lane >> 7) * line + (lane & (tiles.LANES - 1)))
        _add_atomically(part, slot_ptr + ranks, n_slots, finite)


@triton.jit
def _add_atomically(total, at, n_slots, finite):
    high = tl.where(finite, total >> 32, 0)
    low = tl.where(finite, total & 0xFFFFFFFF, total)
    tl.atomic_add(at, low, mask=total != 0, sem="relaxed")
    tl.atomic_add(at + 2 * n_slots, high, mask=high != 0, sem="relaxed")


@triton.jit
def mean(slot_ptr, n_slots, count, exists):
    """The sums of some slots (block of pointers), divided by `count` (int64, 1 to 2^31 - 1), rounded once to fp32."""
    zero = tl.zeros(exists.shape, tl.int64)
    # Digits of 32 bits, from the lowest up: the highest so far that is not 0, its place, the two below it, and whether
    # there is something below these.
    place, a, b, c, more = zero, zero, zero, zero, zero
    one_below, two_below, rest_below, carry = zero, zero, zero, zero
    for i in range(10):  # a loop when it runs: unrolled it takes registers and code
        even = tl.load(slot_ptr + 2 * i * n_slots, mask=exists, other=0)
        odd = tl.load(slot_ptr + (2 * i + 1) * n_slots, mask=exists, other=0)
        total = (even & 0xFFFFFFFF) + (carry & 0xFFFFFFFF) + ((odd & 0xFFFF) << 16)
        carry = (total >> 32) + (even >> 32) + (carry >> 32) + (odd >> 16)
        digit = total & 0xFFFFFFFF
        found = digit != 0
        place, a, b = tl.where(found, i, place), tl.where(found, digit, a), tl.where(found, one_below, b)
        c, more = tl.where(found, two_below, c), tl.where(found, rest_below, more)
        rest_below, two_below, one_below = rest_below | two_below, one_below, digit
    # Long division: the count is below 2^31, so of the first two digits of the quotient one is not 0, and then two
    # digits from there on are more than 24 bits.
    first = (a.to(tl.uint32) // count.to(tl.uint32)).to(tl.int64)
    rest = ((a - first * count) << 32) | b
    second = rest // count
    rest = ((rest - second * count) << 32) | c
    third = rest // count
    rest -= third * count
    lower = (first == 0) & (place > 0)
    first = tl.where(lower, second, first)
    second, third = tl.where(lower, third, second), tl.where(lower, 0, third)
    place = tl.where(lower, place - 1, place)
    # Together the two digits have 64 bits; without the last one (it is in `more`) they fit into an int64.
    more = more | third | (rest != 0).to(tl.int64) | (second & 1)
    x = (first << 31) | (second >> 1)
    length = _bit_length(x)
    top = length + 32 * (place - 1)  # place of the highest bit, in units of 2^-149
    shift = tl.maximum(length - 24, 31 - 32 * place)  # 24 bits, or fewer where the units end
    kept = x >> shift
    half = (zero + 1) << (shift - 1)
    below = x & (half + half - 1)
    up = (below > half) | ((below == half) & ((more | (kept & 1)) != 0))
    pattern = tl.where(top >= 23, ((top - 22) << 23) + (kept & 0x7FFFFF), kept) + up.to(tl.int64)
    special = tl.load(slot_ptr + SPECIAL * n_slots, mask=exists, other=0)
    pattern = tl.where(special > 0, 0x7F800000, pattern)
    pattern = tl.where(special >= 1 << 32, 0x7FC00000, pattern)
    return pattern.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def clear(slot_ptr, n_slots, exists):
    """Zeros in place of the sums of some slots."""
    for i in range(ROWS):
        tl.store(slot_ptr + i * n_slots, tl.zeros(exists.shape, tl.int64), mask=exists)


@triton.jit
def _bit_length(x):
    """Number of bits of positive int64 numbers below 2^63; 0 for 0."""
    length = x * 0
    for LOG in tl.static_range(5, -1, -1):
        large = (x >> (1 << LOG)) > 0
        length = tl.where(large, length + (1 << LOG), length)
        x = tl.where(large, x >> (1 << LOG), x)
    return length + x
