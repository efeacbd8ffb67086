"""Standard normals as a pure function of a key: the draw is an address, not a buffer.

``eps`` of one element is a function of ``(seed, parameter, step, sample, element)`` and of nothing else. It does not
depend on the device, the tiling, the packing, the number of threads or the global random state, so a kernel can
regenerate it instead of storing it, a resumed run continues with two integers, and replicas agree without talking.

**Counter.** One call of Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11) turns a
128-bit counter and the 64-bit seed into four words, i.e. into the normals of four neighbouring elements:

====== ====================================================================== ==================
word   content                                                                bound
====== ====================================================================== ==================
``c0`` low 32 bits of ``element >> 2``
``c1`` bits 0-7: high bits of ``element >> 2``; bits 8-30: ``sample``;        element < 2**42,
       bit 31: 1 for prediction draws, 0 for training draws                   sample < 2**23
``c2`` index of the parameter in the optimizer                                < 2**32
``c3`` number of completed steps (training) or of earlier draws (prediction)  < 2**32
====== ====================================================================== ==================

The fields do not overlap and Philox is a bijection of the counter for every seed, so two different draws never use
the same counter and cannot collide. Replicas that draw noise of their own share the field ``sample``: of W replicas,
number r draws its sample s as sample ``s W + r``, so theirs do not collide either.

**Normals.** Box-Muller on the four words ``w0..w3``: elements ``4b, 4b+1`` come from ``(w0, w1)``, elements
``4b+2, 4b+3`` from ``(w2, w3)``. It is made of multiply, add, correctly rounded square root and integer operations
only, each rounded to fp32 on its own: those are the same on every IEEE machine, which libm's log, sin and cos are not.
The largest normal is sqrt(62 ln 2) = 6.556.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ivon_lora.functional import _arrays as arrays
from ivon_lora.functional._arrays import Array, bits, from_bits, horner, split_words, to_float32, to_int32

MASK = 0xFFFFFFFF
PHILOX_M0, PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
PHILOX_ROUNDS = 10

MAX_SAMPLES = 1 << 23
MAX_STEPS = 1 << 32
MAX_SEED = 1 << 64

# Every constant is the fp32 number nearest to the least-maximum-error coefficient, so no backend rounds it differently.
SQRT_HALF_BITS = 0x3F3504F3
LN2 = 0.693147182464599609375
#: log(1+x) = x - x^2/2 + x^3 P(x) on [sqrt(1/2)-1, sqrt(2)-1], relative error 3.2e-8
LOG_P = (
    0.3333390951156616,
    -0.2500133812427521,
    0.19963063299655914,
    -0.1657758355140686,
    0.14914768934249878,
    -0.14267492294311523,
    0.08700437843799591,
)
#: sin(pi t / 2) = t P(t^2) and cos(pi t / 2) = 1 + t^2 P(t^2) on [-1/2, 1/2], errors 3.3e-9 and 3.9e-8
SIN_P = (1.5707963705062866, -0.6459634900093079, 0.07968003302812576, -0.004601659718900919)
COS_P = (-1.2336976528167725, 0.2536032199859619, -0.020417282357811928)


@dataclass(frozen=True)
class NoiseKey:
    """Address of one draw: which seed, which step, which sample of that step, for training or for prediction.

    Args:
        seed: 64-bit seed, ``0 <= seed < 2**64``.
        step: completed optimizer steps (training) or earlier prediction draws (prediction), ``0 <= step < 2**32``.
        sample: index of the sample within the step, ``0 <= sample < 2**23``.
        prediction: draws for prediction live in their own half of the counter space.

    Raises:
        ValueError: a field is outside its bounds.
    """

    seed: int
    step: int
    sample: int = 0
    prediction: bool = False

    def __post_init__(self) -> None:
        for name, bound in (("seed", MAX_SEED), ("step", MAX_STEPS), ("sample", MAX_SAMPLES)):
            value = getattr(self, name)
            if not isinstance(value, int) or not 0 <= value < bound:
                raise ValueError(f"{name} must be an integer in [0, 2**{bound.bit_length() - 1}), got {value!r}")

    @property
    def philox_key(self) -> tuple[int, int]:
        """The two 32-bit key words: low and high half of the seed."""
        return self.seed & MASK, self.seed >> 32

    @property
    def c1(self) -> int:
        """Counter word 1 without the high element bits."""
        return (int(self.prediction) << 31) | (self.sample << 8)


def philox_4x32(c0: Array, c1: Array, c2: Array, c3: Array, k0: int, k1: int) -> tuple[Array, Array, Array, Array]:
    """Philox4x32-10 on numpy uint64, torch int64 or Python integers that hold 32-bit words."""
    for _ in range(PHILOX_ROUNDS):
        (high0, low0), (high1, low1) = split_words(c0 * PHILOX_M0), split_words(c2 * PHILOX_M1)
        high1 ^= c1
        high1 ^= k0
        high0 ^= c3
        high0 ^= k1
        c0, c1, c2, c3 = high1, low1, high0, low0
        k0, k1 = (k0 + PHILOX_W0) & MASK, (k1 + PHILOX_W1) & MASK
    return c0, c1, c2, c3


def box_muller(radius_word: Array, angle_word: Array) -> tuple[Array, Array]:
    """Two int32 words -> two independent standard normals in fp32."""
    # Radius: u = (odd 31-bit integer) / 2^31 lies in (0, 1]; split it into m 2^e with m in [sqrt(1/2), sqrt(2)).
    pattern = bits(to_float32(((radius_word >> 1) & 0x7FFFFFFF) | 1))
    exponent = (pattern - SQRT_HALF_BITS) >> 23
    x = from_bits(pattern - (exponent << 23)) - 1.0
    square = x * x
    log_u = (horner(x, LOG_P) * x) * square - square * 0.5 + x + to_float32(exponent - 31) * LN2
    radius = arrays.sqrt(log_u * -2.0)
    # Angle: 30 bits for a quarter turn around the axis, one bit for the side, one bit to exchange the axes.
    t = to_float32((angle_word & 0x3FFFFFFF) - 0x20000000) * 2.0**-30
    square = t * t
    sine = bits(radius * (horner(square, SIN_P) * t))
    cosine = bits(radius * (horner(square, COS_P) * square + 1.0)) ^ ((angle_word << 1) & -0x80000000)
    exchange = (sine ^ cosine) & (angle_word >> 31)  # the arithmetic shift spreads bit 31 over the word
    return from_bits(cosine ^ exchange), from_bits(sine ^ exchange)


def normals_of_quads(key: NoiseKey, quads: Array, parameters: Array) -> Array:
    """The normals of many groups of four elements.

    Args:
        key: the draw.
        quads: ``(n,)``, ``element >> 2`` of each group, in numpy uint64 or torch int64.
        parameters: ``(n,)``, parameter index of each group.

    Returns:
        fp32 ``(4 n,)``.
    """
    words = philox_4x32(quads & MASK, (quads >> 32) | key.c1, parameters, key.step, *key.philox_key)
    w0, w1, w2, w3 = map(to_int32, words)
    return arrays.library_of(w0).stack([*box_muller(w0, w1), *box_muller(w2, w3)], -1).reshape(-1)


def normal(
    key: NoiseKey,
    parameter: int,
    shape: torch.Size | tuple[int, ...],
    device: torch.device | str,
    first: int = 0,
) -> Tensor:
    """Standard normals of a whole parameter, or of a shard of it, in plain torch operations on any device.

    Args:
        first: index of the shard's first element in the whole parameter.

    Returns:
        fp32 tensor of ``shape``; element ``i`` in C order is the element ``first + i`` of the whole.
    """
    numel = int(np.prod(shape, dtype=np.int64))
    quads = torch.arange(first >> 2, (first + numel + 3) >> 2, dtype=torch.int64, device=device)
    values: Tensor = normals_of_quads(key, quads, torch.full_like(quads, parameter))
    return values[first & 3 : (first & 3) + numel].reshape(shape)
