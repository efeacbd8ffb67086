"""Global memory as a kernel sees it: the bytes of the live tensors of this process."""

from __future__ import annotations

import ctypes
import gc

import numpy as np
import torch

_TENSORS = {torch.Tensor, torch.nn.Parameter}


class Fault(Exception):
    """The kernel did what it must not: an access outside all tensors, not aligned, or that nothing orders."""


class Memory:
    """What is at the addresses of all tensors that are alive when a kernel is launched."""

    def __init__(self) -> None:
        spans = _spans()
        self._starts = np.array([start for start, _ in spans], np.int64)
        self._ends = np.array([end for _, end in spans], np.int64)
        self._base = int(self._starts[0]) // 16 * 16
        n_bytes = (int(self._ends[-1]) - self._base) // 16 * 16 + 16
        # One array from the first tensor to the last. What lies between them is never touched: see `check`.
        self._bytes = np.ctypeslib.as_array((ctypes.c_uint8 * n_bytes).from_address(self._base))
        self._views = {size: self._bytes.view(f"u{size}") for size in (1, 2, 4, 8)}

    def check(self, addresses: np.ndarray, size: int, source: str) -> None:
        """Raise `Fault` unless ``size`` bytes at each address are aligned and in a tensor."""
        place = np.searchsorted(self._starts, addresses, side="right") - 1
        outside = (place < 0) | (addresses + size > self._ends[np.maximum(place, 0)])
        if outside.any():
            raise Fault(f"{source}: {size} bytes at {addresses[outside][0]:#x} are in no tensor")
        if (addresses % size).any():
            raise Fault(f"{source}: {size} bytes at {addresses[addresses % size != 0][0]:#x} are not aligned")

    def load(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Unsigned integers of ``size`` bytes."""
        return self._views[size][(addresses - self._base) // size]

    def store(self, addresses: np.ndarray, values: np.ndarray, source: str) -> None:
        """Write unsigned integers; `Fault` if two threads write different ones to the same place."""
        size = values.dtype.itemsize
        places = (addresses - self._base) // size
        self._views[size][places] = values
        if (self._views[size][places] != values).any():
            raise Fault(f"{source}: two threads write different numbers to the same place")

    def add(self, addresses: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Add to what is there, one thread after another; returns what each found."""
        size = values.dtype.itemsize
        view, places = self._views[size], (addresses - self._base) // size
        found = np.empty_like(values)
        for thread, (place, value) in enumerate(zip(places, values, strict=True)):
            found[thread] = view[place]
            view[place] += value
        return found


def _spans() -> list[tuple[int, int]]:
    """First and last address of the memory of tensors, neighbours joined, in order."""
    tensors = [x for x in gc.get_objects() if type(x) in _TENSORS]  # isinstance asks lazy modules for their class
    tensors += [x.grad for x in tensors if x.is_leaf and x.grad is not None]
    tensors = [x for x in tensors if x.device.type == "cpu" and x.layout == torch.strided]
    storages = {s.data_ptr(): s.nbytes() for x in tensors if (s := x.untyped_storage())}
    spans: list[tuple[int, int]] = []
    for start, size in sorted(storages.items()):
        if size and spans and start <= spans[-1][1]:
            spans[-1] = spans[-1][0], max(spans[-1][1], start + size)
        elif size:
            spans.append((start, start + size))
    return spans
