"""The normals of `ivon_lora.functional.noise` as Triton device functions: same words, same operations, same bits.

The counter layout and the reason for every constant are written down there. Launch with `enable_fp_fusion=False`: a
fused multiply-add rounds once where `ivon_lora.functional.noise` rounds twice.
"""

import triton
import triton.language as tl

SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
LN2 = tl.constexpr(0.693147182464599609375)


@triton.jit
def log_polynomial(x):
    """P of log(1+x) = x - x^2/2 + x^3 P(x)."""
    y = x * 0.08700437843799591 + -0.14267492294311523
    y = y * x + 0.14914768934249878
    y = y * x + -0.1657758355140686
    y = y * x + 0.19963063299655914
    y = y * x + -0.2500133812427521
    return y * x + 0.3333390951156616


@triton.jit
def sine_polynomial(square):
    """P of sin(pi t / 2) = t P(t^2)."""
    y = square * -0.004601659718900919 + 0.07968003302812576
    y = y * square + -0.6459634900093079
    return y * square + 1.5707963705062866


@triton.jit
def cosine_polynomial(square):
    """P of cos(pi t / 2) = 1 + t^2 P(t^2)."""
    y = square * -0.020417282357811928 + 0.2536032199859619
    return y * square + -1.2336976528167725


@triton.jit
def box_muller(radius_word, angle_word):
    """Two blocks of int32 words -> two blocks of independent standard normals (fp32)."""
    pattern = (((radius_word >> 1) & 0x7FFFFFFF) | 1).to(tl.float32).to(tl.int32, bitcast=True)
    exponent = (pattern - SQRT_HALF_BITS) >> 23
    x = (pattern - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    square = x * x
    log_u = (log_polynomial(x) * x) * square - square * 0.5 + x + (exponent - 31).to(tl.float32) * LN2
    radius = tl.sqrt_rn(log_u * -2.0)

    t = ((angle_word & 0x3FFFFFFF) - 0x20000000).to(tl.float32) * 9.313225746154785e-10  # 2^-30
    square = t * t
    sine = (radius * (sine_polynomial(square) * t)).to(tl.int32, bitcast=True)
    cosine = (radius * (cosine_polynomial(square) * square + 1.0)).to(tl.int32, bitcast=True)
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
