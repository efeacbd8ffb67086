"""The normals of `noise`, bit for bit, in fewer and cheaper numpy passes over memory that is there already.

Philox works on two 32-bit words at a time here: one uint64 holds ``c0`` and ``c1``, another ``c2`` and ``c3``. With
``[high : low]`` a round is ``[c0 : c1] <- c2 M1 ^ [c1 ^ k0 : 0]`` and ``[c2 : c3] <- c0 M0 ^ [c3 ^ k1 : 0]``,
since the low word of the product is the new odd word as it stands. The first two rounds are shorter: only ``c0``
differs between the elements of a parameter, so half of them is the same number for all.
"""

from __future__ import annotations

import numpy as np

from ivon_lora.noise import (
    MASK,
    PHILOX_M0,
    PHILOX_M1,
    PHILOX_ROUNDS,
    PHILOX_W0,
    PHILOX_W1,
    NoiseKey,
    normals_of_quads,
    polar_normals,
)
from ivon_lora.programs import INT, Program, Scratch

_M0, _M1, _HALF = np.array(PHILOX_M0, np.uint64), np.array(PHILOX_M1, np.uint64), np.array(32, np.uint64)
_WORD = np.array(MASK, np.uint64)


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
        if np.any((firsts >> 32) != ((firsts + counts - 1) >> 32)):  # the counter's word 1 changes on the way
            quads = np.concatenate([np.arange(a, a + c, dtype=np.uint64) for a, c in zip(firsts, counts, strict=True)])
            normals_of_quads(key, quads, np.repeat(parameters.astype(np.uint64), counts), out.reshape(-1, 4))
            return
        a, b, radii, angles = self._words(key, firsts, counts, parameters, n)
        np.right_shift(a, np.uint64(33), self._p)
        np.copyto(radii[:n], self._p, casting="unsafe")
        np.right_shift(b, np.uint64(33), self._p)
        np.copyto(radii[n:], self._p, casting="unsafe")
        np.copyto(angles[:n], a, casting="unsafe")
        np.copyto(angles[n:], b, casting="unsafe")
        x, y = self._box_muller.run(self._scratch, 2 * n, [radii, angles])
        groups = out.reshape(-1, 4)
        groups[:, 0], groups[:, 1], groups[:, 2], groups[:, 3] = x[:n], y[:n], x[n:], y[n:]
        if key.mirrored:
            np.negative(out, out)

    def _words(
        self, key: NoiseKey, firsts: np.ndarray, counts: np.ndarray, parameters: np.ndarray, n: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """[c0 : c1] and [c2 : c3] of n groups after all rounds, and memory for 2 n words twice."""
        rows = self._philox_memory.rows(6, 8 * n).view(np.uint64)
        a, b, p, q = rows[0], rows[1], rows[2], rows[3]
        self._p = p
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
        for k0, k1 in keys[2:]:
            np.right_shift(a, _HALF, p)
            np.multiply(p, _M0, p)
            np.right_shift(b, _HALF, q)
            np.multiply(q, _M1, q)
            np.left_shift(a, _HALF, a)
            np.bitwise_xor(a, np.array(k0 << 32, np.uint64), a)
            np.bitwise_xor(a, q, a)
            np.left_shift(b, _HALF, b)
            np.bitwise_xor(b, np.array(k1 << 32, np.uint64), b)
            np.bitwise_xor(b, p, b)
        return a, b, rows[4].view(np.int32), rows[5].view(np.int32)


def _spread(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return values[0] if len(values) == 1 else np.repeat(values, counts)
