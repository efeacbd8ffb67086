"""Exact sums of non-negative fp32 numbers, and their quotient by a count rounded once.

A sum is kept as int64 numbers: 18 windows, 16 bits apart, of which each takes 32 bits of every addition (window w
counts units of 2^(16 w - 149)), and one that counts what is not finite; together they span all of fp32. A tile adds up
its mantissas in 64 bits, in units of the window where its smallest number lies, as far as they reach, which is mostly
all of them, else in several passes; the halves of each such sum are the additions to two windows. Integer addition is
associative, so neither the tiling nor the order of the atomic additions can change a bit, and no magnitude is too small
or too large. Up to 2^31 - 1 elements fit without overflow. The mean is a long division of the 320-bit number, rounded
to nearest even: the fp32 number nearest to the true mean.

The sums of ranks lie window by window, [ROWS, n_slots]. A sum over a whole tensor lies in `STRIPES` pieces of `PITCH`
numbers, so that the programs of a large tensor do not all wait for the same addresses.
"""

import triton
import triton.language as tl

from ivon_lora.kernels import tiles

#: the row of the sums that counts infinities in its low and NaNs in its high 32 bits
SPECIAL = tl.constexpr(18)
ROWS = tl.constexpr(19)
#: position of what is not finite: an exponent of 255
NOT_FINITE = tl.constexpr(254)

#: Positions that one pass takes beyond that of its unit: 24 bits of mantissa, these, and the bits of the number of
#: elements are 63. Small tiles are those of up to 2^9 elements, others have up to 2^15, see `tiles.LARGEST`.
REACH_OF_SMALL, REACH = tl.constexpr(30), tl.constexpr(24)

#: pieces of a sum over a whole tensor, and the numbers of each: room for `ROWS` and more, in whole lines of the cache
STRIPES = tl.constexpr(8)
PITCH = tl.constexpr(32)


@triton.jit
def _put(total, at, pitch, window, FINITE: tl.constexpr):
    """Add non-negative int64 numbers to the windows that begin at `at`, `pitch` apart.

    FINITE: they count units of this window; otherwise what is not finite.
    """
    at += window * pitch
    if FINITE:
        high = total >> 32
        tl.atomic_add(at, total & 0xFFFFFFFF, mask=total != 0, sem="relaxed")
        tl.atomic_add(at + 2 * pitch, high, mask=high != 0, sem="relaxed")
    else:
        tl.atomic_add(at, total, mask=total != 0, sem="relaxed")


@triton.jit
def _add(part, to, pitch, window, item, row, TILE: tl.constexpr, VECTOR: tl.constexpr, FINITE: tl.constexpr):
    """Add the int64 block `part` to the sums of the ranks it belongs to; `to` is the first sum of the tensor.

    Within one period, and in tiles that have but one, lanes are as far behind the base as their numbers say.
    """
    if VECTOR:
        if tl.load(item + tiles.ITEM_KIND) == tiles.RUN:
            _put(tl.sum(part), to + tl.load(item + tiles.ITEM_RANK), pitch, window, FINITE)
        elif tl.load(item + tiles.ITEM_KIND) == tiles.PERIODIC:
            PERIOD: tl.constexpr = tiles.SHORT_PERIOD if TILE > tiles.SHORT_PERIOD else TILE
            columns = tl.sum(tl.reshape(part, (TILE // PERIOD, PERIOD)), 0)
            _put(columns, to + tiles.ranks(item, row, tl.arange(0, PERIOD)), pitch, window, FINITE)
        else:
            _put(part, to + tiles.ranks(item, row, tl.arange(0, TILE)), pitch, window, FINITE)
    else:
        _put(part, to + tiles.ranks(item, row, tl.arange(0, TILE)), pitch, window, FINITE)


@triton.jit
def _cut(values, exists):
    """Non-negative fp32 values as mantissa 2^(position - 149): two int32 blocks.

    What is not finite has the position `NOT_FINITE`.
    """
    pattern = tl.where(exists, values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    exponent, fraction = pattern >> 23, pattern & 0x7FFFFF
    return tl.where(exponent > 0, fraction | 0x800000, fraction), tl.maximum(exponent, 1) - 1


@triton.jit
def _lowest(mantissa, position):
    return tl.min(tl.where(mantissa == 0, NOT_FINITE, position))


@triton.jit
def _specials(mantissa, position):
    special = tl.where(mantissa == 0x800000, 1, 1 << 32)
    return tl.where(position == NOT_FINITE, special, 0)


@triton.jit
def _taken(mantissa, position, first):
    """One pass over the values, from position `first` on: what they count (int64 block) in units of a window.

    Also returns the window, and the position where the next pass begins.
    """
    reach: tl.constexpr = REACH_OF_SMALL if position.shape[0] <= 512 else REACH
    window = first >> 4
    unit = window << 4
    stop = unit + reach + 1
    inside = (position >= first) & (position < stop)
    return tl.where(inside, mantissa, 0).to(tl.int64) << ((position - unit) & 63).to(tl.int64), window, stop


@triton.jit
def accumulate(values, exists, item, row, sums, n_slots, TILE: tl.constexpr, VECTOR: tl.constexpr):
    """Add non-negative values (fp32 [TILE]) to the sums of their ranks.

    sums: int64 [ROWS, n_slots].
    """
    to = sums + tl.load(row + tiles.SLOT)
    mantissa, position = _cut(values, exists)
    first, last = _lowest(mantissa, position), tl.max(position)
    if last == NOT_FINITE:
        _add(_specials(mantissa, position), to, n_slots, SPECIAL, item, row, TILE, VECTOR, False)
        mantissa = tl.where(position == NOT_FINITE, 0, mantissa)
    while first <= last:
        part, window, first = _taken(mantissa, position, first)
        _add(part, to, n_slots, window, item, row, TILE, VECTOR, True)


@triton.jit
def accumulate_all(values, exists, sums, stripe):
    """Add non-negative values (fp32 [TILE]) to one sum.

    sums: int64 [STRIPES, PITCH].  stripe: any number below STRIPES.
    """
    to = sums + stripe * PITCH
    mantissa, position = _cut(values, exists)
    first, last = _lowest(mantissa, position), tl.max(position)
    if last == NOT_FINITE:
        _put(tl.sum(_specials(mantissa, position)), to, 1, SPECIAL, False)
        mantissa = tl.where(position == NOT_FINITE, 0, mantissa)
    while first <= last:
        part, window, first = _taken(mantissa, position, first)
        _put(tl.sum(part), to, 1, window, True)


@triton.jit
def _bit_length(x):
    """Number of bits of positive int64 numbers below 2^63; 0 for 0."""
    length = x * 0
    for LOG in tl.static_range(5, -1, -1):
        large = (x >> (1 << LOG)) > 0
        length = tl.where(large, length + (1 << LOG), length)
        x = tl.where(large, x >> (1 << LOG), x)
    return length + x


@triton.jit
def mean(sums, slot, n_slots, count, exists):
    """The sums of some slots (int64 block), divided by `count` (int64 block, 1 to 2^31 - 1), rounded once to fp32."""
    at, pitch = sums + slot, n_slots
    carry = tl.zeros_like(slot)
    d0, carry = _digit(at, pitch, exists, carry)
    d1, carry = _digit(at + 2 * pitch, pitch, exists, carry)
    d2, carry = _digit(at + 4 * pitch, pitch, exists, carry)
    d3, carry = _digit(at + 6 * pitch, pitch, exists, carry)
    d4, carry = _digit(at + 8 * pitch, pitch, exists, carry)
    d5, carry = _digit(at + 10 * pitch, pitch, exists, carry)
    d6, carry = _digit(at + 12 * pitch, pitch, exists, carry)
    d7, carry = _digit(at + 14 * pitch, pitch, exists, carry)
    d8, carry = _digit(at + 16 * pitch, pitch, exists, carry)
    special = tl.load(at + SPECIAL * pitch, mask=exists, other=0, cache_modifier=".cg")
    return _quotient(d0, d1, d2, d3, d4, d5, d6, d7, d8, carry, special, count)


@triton.jit
def mean_of_all(sums, count):
    """The sum of `accumulate_all`, divided by `count` (int64 scalar, 1 to 2^31 - 1), rounded once to fp32."""
    at = sums + tl.arange(0, STRIPES) * PITCH
    carry = count * 0
    d0, carry = _digit_of_all(at, carry)
    d1, carry = _digit_of_all(at + 2, carry)
    d2, carry = _digit_of_all(at + 4, carry)
    d3, carry = _digit_of_all(at + 6, carry)
    d4, carry = _digit_of_all(at + 8, carry)
    d5, carry = _digit_of_all(at + 10, carry)
    d6, carry = _digit_of_all(at + 12, carry)
    d7, carry = _digit_of_all(at + 14, carry)
    d8, carry = _digit_of_all(at + 16, carry)
    special = tl.sum(tl.load(at + SPECIAL, cache_modifier=".cg"))
    return _quotient(d0, d1, d2, d3, d4, d5, d6, d7, d8, carry, special, count)


@triton.jit
def clear_all(sums):
    """Zeros in place of one sum, and of what else lies in its lines."""
    at = tl.arange(0, STRIPES * PITCH)
    tl.store(sums + at, tl.zeros_like(at).to(tl.int64))


@triton.jit
def _quotient(d0, d1, d2, d3, d4, d5, d6, d7, d8, carry, special, count):
    """The number of these digits (32 bits each, `carry` is the highest), divided by `count`, rounded once to fp32."""
    # The highest digit that is not 0, its place, the two below it, and whether there is something below these.
    zero = carry * 0
    place, a, b, c, more = zero, d0, zero, zero, zero
    place, a, b, c, more = _higher(1, d1, d0, zero, zero, place, a, b, c, more)
    place, a, b, c, more = _higher(2, d2, d1, d0, zero, place, a, b, c, more)
    below = d0
    place, a, b, c, more = _higher(3, d3, d2, d1, below, place, a, b, c, more)
    below = below | d1
    place, a, b, c, more = _higher(4, d4, d3, d2, below, place, a, b, c, more)
    below = below | d2
    place, a, b, c, more = _higher(5, d5, d4, d3, below, place, a, b, c, more)
    below = below | d3
    place, a, b, c, more = _higher(6, d6, d5, d4, below, place, a, b, c, more)
    below = below | d4
    place, a, b, c, more = _higher(7, d7, d6, d5, below, place, a, b, c, more)
    below = below | d5
    place, a, b, c, more = _higher(8, d8, d7, d6, below, place, a, b, c, more)
    below = below | d6
    place, a, b, c, more = _higher(9, carry, d8, d7, below, place, a, b, c, more)
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
    more = more | third
    more = more | (rest != 0).to(tl.int64) | (second & 1)
    # Together the two digits have 64 bits; without the last one (it is in `more`) they fit into an int64.
    x = (first << 31) | (second >> 1)
    length = _bit_length(x)
    top = length + 32 * (place - 1)  # place of the highest bit, in units of 2^-149
    shift = tl.maximum(length - 24, 31 - 32 * place)  # 24 bits, or fewer where the units end
    kept = x >> shift
    half = (x * 0 + 1) << (shift - 1)
    below = x & (half + half - 1)
    up = (below > half) | ((below == half) & ((more | (kept & 1)) != 0))
    pattern = tl.where(top >= 23, ((top - 22) << 23) + (kept & 0x7FFFFF), kept) + up.to(tl.int64)
    pattern = tl.where(special > 0, 0x7F800000, pattern)
    pattern = tl.where(special >= 1 << 32, 0x7FC00000, pattern)
    return pattern.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _digit(at, pitch, exists, carry):
    """32 bits of a sum, from two windows and what overflows those below; what overflows these goes to the next digit.

    The loads skip the first cache, which other processors cannot see.
    """
    even = tl.load(at, mask=exists, other=0, cache_modifier=".cg")
    odd = tl.load(at + pitch, mask=exists, other=0, cache_modifier=".cg")
    return _carried(even, odd, carry)


@triton.jit
def _digit_of_all(at, carry):
    even, odd = tl.sum(tl.load(at, cache_modifier=".cg")), tl.sum(tl.load(at + 1, cache_modifier=".cg"))
    return _carried(even, odd, carry)


@triton.jit
def _carried(even, odd, carry):
    total = (even & 0xFFFFFFFF) + (carry & 0xFFFFFFFF) + ((odd & 0xFFFF) << 16)
    return total & 0xFFFFFFFF, (total >> 32) + (even >> 32) + (carry >> 32) + (odd >> 16)


@triton.jit
def _higher(PLACE: tl.constexpr, digit, next, after, below, place, a, b, c, more):
    """These digits in place of those found so far, if the first of them is not 0."""
    found = digit != 0
    return (
        tl.where(found, PLACE, place),
        tl.where(found, digit, a),
        tl.where(found, next, b),
        tl.where(found, after, c),
        tl.where(found, below, more),
    )
