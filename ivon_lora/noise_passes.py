"""The normals of `noise`, bit for bit, in fewer and cheaper numpy passes over memory that is there already.

Philox multiplies words of 32 bits to products of 64. Numpy's cheapest passes are those over neighbours, so everything
stays where the products are: of a round's ``P = c0 M0`` and ``Q = c2 M1`` the low halves are the new ``c3`` and ``c1``
as they stand, and the new ``c0`` is the high half of Q, the old ``c1`` (the low half of the Q before) and a key,
exclusively or. Two arrays of 32-bit halves, one of them begun a half later, bring the right halves together; what the
other halves become is masked. The first two rounds are shorter: only ``c0`` differs between the elements of a
parameter, so half of them is the same number for all.
"""

from __future__ import annotations

import sys

import numpy as np

from ivon_lora.functional import _arrays as arrays
from ivon_lora.functional._arrays import Array, bits, from_bits, horner, to_float32
from ivon_lora.functional.noise import (
    COS_P,
    LN2,
    LOG_P,
    MASK,
    PHILOX_M0,
    PHILOX_M1,
    PHILOX_ROUNDS,
    PHILOX_W0,
    PHILOX_W1,
    SIN_P,
    SQRT_HALF_BITS,
    NoiseKey,
    normals_of_quads,
)
from ivon_lora.programs import INT, Program, Scratch

_M0, _M1, _HALF = np.array(PHILOX_M0, np.uint64), np.array(PHILOX_M1, np.uint64), np.array(32, np.uint64)
_WORD = np.array(MASK, np.uint64)

#: powers of two are taken out of the polynomials, see :func:`polar_normals`
_LOG_P = tuple(c * 2.0 ** (k + 2) for k, c in enumerate(LOG_P))
_SIN_P, _COS_P = tuple(2.0 * c for c in SIN_P), tuple(2.0 * c for c in COS_P)
_FRACTION = (1 << 23) - 1


def polar_normals(radius_bits: Array, angle_word: Array) -> tuple[Array, Array]:
    """The bits of `noise.polar_normals` in fewer operations.

    Multiplying by a power of two commutes with rounding, so it can be done to the constants instead of the arrays. Here
    x is half of the x there, hence ``square`` a quarter, log(u) is halved, and so is the radius; sine and cosine make
    up for that. The exponent stays where it is in the word, 31 less than there.
    """
    fixed = bits(to_float32(radius_bits | 1)) - (SQRT_HALF_BITS + (31 << 23))
    x = from_bits((fixed & _FRACTION) + (SQRT_HALF_BITS - (1 << 23))) - 0.5
    square = x * x
    half_log_m = (horner(x, _LOG_P) * x) * square - square + x
    # the difference of two zeros is negative here, as the product with -2 is there
    radius = arrays.sqrt(to_float32(fixed & ~_FRACTION) * (-LN2 * 2.0**-24) - half_log_m)
    t = to_float32((angle_word & 0x3FFFFFFF) - 0x20000000) * 2.0**-30
    square = t * t
    sine = bits(radius * (horner(square, _SIN_P) * t))
    cosine = bits(radius * (horner(square, _COS_P) * square + 2.0)) ^ ((angle_word << 1) & -0x80000000)
    exchange = (sine ^ cosine) & (angle_word >> 31)
    return from_bits(cosine ^ exchange), from_bits(sine ^ exchange)


class NormalPasses:
    """Draws normals in memory of its own, which grows to what the largest block needs."""

    def __init__(self) -> None:
        self._box_muller = Program(lambda *words: polar_normals(*words), [INT, INT], 0)
        self._philox_memory, self._scratch = Scratch(), Scratch()
        self._multiples = np.empty(0, np.uint64)

    def draw(
        self, key: NoiseKey, firsts: np.ndarray, counts: np.ndarray, parameters: np.ndarray, out: np.ndarray
    ) -> None:
        """Write the normals of some runs of groups of four elements.

        Args:
            key: the draw.
            firsts: int64 (s,), ``element >> 2`` of the first group of each run.
            counts: int64 (s,), groups of each run, n in all.
            parameters: int64 (s,), the parameter that the run lies in.
            out: fp32 (4 n,), contiguous, receives the normals.
        """
        n = len(out) >> 2
        crossing = (firsts >> 32) != ((firsts + counts - 1) >> 32)  # the counter's word 1 changes on the way
        if crossing.any() or sys.byteorder == "big":
            quads = np.concatenate([np.arange(a, a + c, dtype=np.uint64) for a, c in zip(firsts, counts, strict=True)])
            normals_of_quads(key, quads, np.repeat(parameters.astype(np.uint64), counts), out.reshape(-1, 4))
            return
        x, y = self._box_muller.run(self._scratch, 2 * n, self._words(key, firsts, counts, parameters, n))
        groups = out.reshape(-1, 4)
        groups[:, 0], groups[:, 1], groups[:, 2], groups[:, 3] = x[:n], y[:n], x[n:], y[n:]
        if key.mirrored:
            np.negative(out, out)

    def _words(
        self, key: NoiseKey, firsts: np.ndarray, counts: np.ndarray, parameters: np.ndarray, n: int
    ) -> list[np.ndarray]:
        """Of n groups after all rounds, int32 (2 n,): the upper 31 bits of c0, then of c2; and c1, then c3."""
        rows = self._philox_memory.rows(6, 8 * n).view(np.uint64)
        a, b, p, q = rows[0], rows[1], rows[2], rows[3]
        k0, k1 = key.philox_key
        # Round 1: c0 M0 is all that differs from element to element, by M0 from one to the next.
        if len(self._multiples) < n:
            self._multiples = np.arange(n, dtype=np.uint64) * _M0
        unsigned = firsts.astype(np.uint64)
        starts = np.cumsum(counts) - counts
        product = parameters.astype(np.uint64) * _M1
        c0 = (product >> _HALF) ^ (unsigned >> _HALF) ^ np.uint64(key.c1 ^ k0)
        c1 = product & _WORD
        base = (unsigned & _WORD) * _M0 - starts.astype(np.uint64) * _M0
        # Round 2: of the product with c0 the same number for all.
        product = c0 * _M0
        keys = [((k0 + r * PHILOX_W0) & MASK, (k1 + r * PHILOX_W1) & MASK) for r in range(PHILOX_ROUNDS)]
        for_a = (c1 ^ np.uint64(keys[1][0])) << _HALF
        for_b = product ^ np.uint64(keys[1][1] << 32)
        np.add(self._multiples[:n], _spread(base, counts), b)
        np.bitwise_xor(b, np.uint64((key.step ^ k1) << 32), b)
        np.right_shift(b, _HALF, q)
        np.multiply(q, _M1, a)
        np.bitwise_xor(a, _spread(for_a, counts), a)
        np.left_shift(b, _HALF, b)
        np.bitwise_xor(b, _spread(for_b, counts), b)
        np.right_shift(a, _HALF, p)
        np.multiply(p, _M0, p)
        np.right_shift(b, _HALF, q)
        np.multiply(q, _M1, q)
        # From here on p and q are the products of the round before, c1 and c3 the low halves of a and b.
        radii, angles = rows[4].view(np.uint32), rows[5].view(np.int32)
        for k0, k1 in keys[2:-1]:
            _meet(q, a)
            np.bitwise_and(a, _WORD, a)
            np.bitwise_xor(a, np.array(k0, np.uint64), a)
            np.multiply(a, _M0, a)
            _meet(p, b)
            np.bitwise_and(b, _WORD, b)
            np.bitwise_xor(b, np.array(k1, np.uint64), b)
            np.multiply(b, _M1, b)
            a, b, p, q = q, p, a, b
        for product, before, key_word, part in ((q, a, keys[-1][0], slice(n)), (p, b, keys[-1][1], slice(n, None))):
            _meet(product, before)
            np.copyto(radii[part], before, casting="unsafe")
            np.bitwise_xor(radii[part], np.array(key_word, np.uint32), radii[part])
            np.copyto(angles[part], product, casting="unsafe")
        np.right_shift(radii, np.array(1, np.uint32), radii)
        return [radii.view(np.int32), angles]


def _meet(product: np.ndarray, before: np.ndarray) -> None:
    """The low halves of ``before`` become high half of the product ^ low half; its high halves become anything."""
    high, low = product.view(np.uint32)[1:], before.view(np.uint32)[:-1]
    np.bitwise_xor(high, low, low)


def _spread(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return values[0] if len(values) == 1 else np.repeat(values, counts)
