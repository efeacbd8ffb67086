"""The few operations that numpy and torch spell, or round, differently.

The maths of this package (`noise`, `reference`, `scores`) is written once, with operators, for numpy arrays and torch
tensors alike; what operators cannot say is here. Every function rounds correctly, so both give the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

#: a numpy array or a torch tensor: functions return the kind they are given
Array = Any


def sqrt(x: Array) -> Array:
    """Correctly rounded square root. On CPU, torch's own fp32 sqrt (MKL) is one ulp off for 15 % of its arguments."""
    if isinstance(x, np.ndarray):
        return np.sqrt(x)
    if x.device.type == "cpu" and x.dtype == torch.float32:
        return x.double().sqrt().float()  # rounding a 53-bit root to 24 bits is exact, since 53 >= 2 * 24 + 2
    return x.sqrt()


def isfinite(x: Array) -> Array:
    """True where neither infinite nor NaN."""
    return np.isfinite(x) if isinstance(x, np.ndarray) else torch.isfinite(x)


def clamp(x: Array, low: float, high: float) -> Array:
    """``min(max(x, low), high)``; NaN stays NaN."""
    return np.clip(x, low, high) if isinstance(x, np.ndarray) else x.clamp(low, high)


def where(condition: Array, x: Array, y: Array) -> Array:
    """``x`` where the condition holds, ``y`` elsewhere."""
    return np.where(condition, x, y) if isinstance(condition, np.ndarray) else torch.where(condition, x, y)


def keep(condition: Array, new: Array, old: Array) -> Array:
    """``where(condition, new, old)`` for a condition that nearly always holds everywhere."""
    if isinstance(condition, np.ndarray):
        return new if condition.all() else np.where(condition, new, old)
    return torch.where(condition, new, old)  # asking first would wait for the device


def to_int32(x: Array) -> Array:
    """int64 -> int32 with the same low 32 bits."""
    return x.astype(np.int32) if isinstance(x, np.ndarray) else x.to(torch.int32)


def to_float32(x: Array) -> Array:
    """int32 -> nearest fp32."""
    return x.astype(np.float32) if isinstance(x, np.ndarray) else x.to(torch.float32)


def bits(x: Array) -> Array:
    """fp32 -> its bit pattern as int32, without copying."""
    return x.view(np.int32) if isinstance(x, np.ndarray) else x.view(torch.int32)


def from_bits(x: Array) -> Array:
    """Bit pattern -> fp32, without copying."""
    return x.view(np.float32) if isinstance(x, np.ndarray) else x.view(torch.float32)


def horner(x: Array, coefficients: tuple[float, ...]) -> Array:
    """Polynomial, constant term first: one multiply and one add per degree, each rounded on its own."""
    y = x * coefficients[-1] + coefficients[-2]
    for c in reversed(coefficients[:-2]):
        y = y * x + c
    return y
