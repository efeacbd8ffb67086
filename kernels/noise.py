"""The normals of `ivon_lora.functional.noise` as Triton device functions: same words, same operations, same bits.

The counter layout and the reason for every constant are written down there. Launch with `enable_fp_fusion=False`: a
fused multiply-add rounds once where `ivon_lora.functional.noise` rounds twice.
"""

import triton
import triton.language as tl

from ivon_lora.functional import noise

SQRT_HALF_BITS, LN2 = tl.constexpr(noise.SQRT_HALF_BITS), tl.constexpr(noise.LN2)
LOG_P, SIN_P, COS_P = tl.constexpr(noise.LOG_P), tl.constexpr(noise.SIN_P), tl.constexpr(noise.COS_P)


@triton.jit
def horner(x, COEFFICIENTS: tl.constexpr, N: tl.constexpr):
    """Polynomial of N coefficients, constant term first: one multiply and one add per degree, each rounded."""
    y = x * COEFFICIENTS[N - 1] + COEFFICIENTS[N - 2]
    for i in tl.static_range(N - 3, -1, -1):
        y = y * x + COEFFICIENTS[i]
    return y


@triton.jit
def box_muller(radius_word, angle_word):
    """Two blocks of int32 words -> two blocks of independent standard normals (fp32)."""
    pattern = (((radius_word >> 1) & 0x7FFFFFFF) | 1).to(tl.float32).to(tl.int32, bitcast=True)
    exponent = (pattern - SQRT_HALF_BITS) >> 23
    x = (pattern - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    square = x * x
    log_u = (horner(x, LOG_P, 7) * x) * square - square * 0.5 + x + (exponent - 31).to(tl.float32) * LN2
    radius = tl.sqrt_rn(log_u * -2.0)

    t = ((angle_word & 0x3FFFFFFF) - 0x20000000).to(tl.float32) * 9.313225746154785e-10  # 2^-30
    square = t * t
    sine = (radius * (horner(square, SIN_P, 4) * t)).to(tl.int32, bitcast=True)
    cosine = (radius * (horner(square, COS_P, 3) * square + 1.0)).to(tl.int32, bitcast=True)
    cosine = cosine ^ ((angle_word << 1) & -0x80000000)
    exchange = (sine ^ cosine) & (angle_word >> 31)
    return (cosine ^ exchange).to(tl.float32, bitcast=True), (sine ^ exchange).to(tl.float32, bitcast=True)


@triton.jit
def normals(quads, key_ptr, parameter):
    """Normals of groups of four neighbouring elements, in order: fp32 [4 n].

    quads: int64 [n], `element >> 2`.  key_ptr: int64 [3], the seed's bit pattern, counter word 1 without the element
    bits (`NoiseKey.c1`), the step.  parameter: int64.
    """
    seed, c1, step = tl.load(key_ptr), tl.load(key_ptr + 1), tl.load(key_ptr + 2)
    low, high = quads.to(tl.uint32), ((quads >> 32) | c1).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, parameter.to(tl.uint32), step.to(tl.uint32))
    n0, n1 = box_muller(w0.to(tl.int32, bitcast=True), w1.to(tl.int32, bitcast=True))
    n2, n3 = box_muller(w2.to(tl.int32, bitcast=True), w3.to(tl.int32, bitcast=True))
    pairs = tl.join(tl.join(n0, n2), tl.join(n1, n3))  # [n, 2, 2]: row (n0, n1), row (n2, n3)
    return tl.reshape(pairs, (4 * quads.shape[0],))
