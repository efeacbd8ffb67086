"""The few operations that numpy and torch spell, or round, differently.

The maths of this package (`ivon`, `noise`, `importance`) is written once, with operators, for numpy arrays and torch
tensors alike; what operators cannot say is here. Every function rounds correctly, so both give the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

#: a numpy array or a torch tensor: functions return the kind they are given
Array = Any


def library_of(x: Array) -> Any:
    """The module ``torch`` or ``numpy``, for functions that both have by the same name and arguments."""
    return torch if isinstance(x, torch.Tensor) else np


def sqrt(x: Array) -> Array:
    """Correctly rounded square root. On CPU numpy's: torch's own (MKL) is one ulp off for some arguments."""
    if not isinstance(x, torch.Tensor):
        return np.sqrt(x)
    return torch.from_numpy(np.asarray(np.sqrt(x.detach().numpy()))) if x.device.type == "cpu" else x.sqrt()


def keep(condition: Array, new: Array, old: Array) -> Array:
    """``where(condition, new, old)`` for a condition that nearly always holds everywhere."""
    if isinstance(condition, torch.Tensor):
        return torch.where(condition, new, old)  # asking first would wait for the device
    return new if condition.all() else np.where(condition, new, old)


def split_words(product: Array) -> tuple[Array, Array]:
    """High and low 32 bits of a 64-bit product of numpy uint64, torch int64 or Python integers; may use its memory."""
    low = product & 0xFFFFFFFF
    product >>= 32
    if isinstance(product, torch.Tensor):
        product &= 0xFFFFFFFF  # int64: the product wrapped, and the shift brought its sign along
    return product, low


def to_int32(x: Array) -> Array:
    """64-bit integer -> int32 with the same low 32 bits."""
    return x.to(torch.int32) if isinstance(x, torch.Tensor) else x.astype(np.int32)


def to_float32(x: Array) -> Array:
    """int32 -> nearest fp32."""
    return x.to(torch.float32) if isinstance(x, torch.Tensor) else x.astype(np.float32)


def bits(x: Array) -> Array:
    """fp32 -> its bit pattern as int32, without copying."""
    return x.view(library_of(x).int32)


def from_bits(x: Array) -> Array:
    """Bit pattern -> fp32, without copying."""
    return x.view(library_of(x).float32)


def horner(x: Array, coefficients: tuple[float, ...]) -> Array:
    """Polynomial, constant term first: one multiply and one add per degree, each rounded on its own."""
    y = x * coefficients[-1]
    y += coefficients[-2]
    for c in reversed(coefficients[:-2]):  # in place: half the time of an expression that allocates
        y *= x
        y += c
    return y
