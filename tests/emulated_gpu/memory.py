"""Memory as a kernel sees it: the live tensors of this process, and what the threads of a block share."""

from __future__ import annotations

import ctypes
import gc
from dataclasses import dataclass

import numpy as np
import torch

_TENSORS = {torch.Tensor, torch.nn.Parameter}


class Fault(Exception):
    """The kernel did what it must not: an access outside all tensors, not aligned, or that nothing orders."""


class GlobalMemory:
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

    def store(self, addresses: np.ndarray, values: np.ndarray) -> None:
        """Write unsigned integers."""
        size = values.dtype.itemsize
        self._views[size][(addresses - self._base) // size] = values

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


@dataclass(frozen=True)
class Who:
    """Threads that touch shared memory: their blocks, their warps within these, and the barriers these have passed."""

    blocks: np.ndarray
    warps: np.ndarray
    barriers: np.ndarray


class SharedMemory:
    """The shared memory of every block of threads; accesses between two barriers must not get in each other's way.

    Args:
        n_blocks, n_bytes: blocks of threads, and what each has.
        n_warps: per block.
        checks_order: whether to look for what no barrier orders.
    """

    def __init__(self, n_blocks: int, n_bytes: int, n_warps: int, checks_order: bool = True) -> None:
        self._n_bytes, self._checks_order = n_bytes, checks_order
        self._bytes = np.zeros(n_blocks * n_bytes, np.uint8)
        # How many barriers the block had passed when each warp last read and wrote a byte; -1: it never did.
        self._read = np.full((n_blocks * n_bytes, n_warps), -1, np.int32)
        self._written = self._read.copy()

    def check(self, addresses: np.ndarray, size: int, source: str) -> None:
        """Raise `Fault` unless ``size`` bytes at each address are aligned and inside."""
        if (addresses < 0).any() or (addresses + size > self._n_bytes).any():
            raise Fault(f"{source}: {size} bytes at {addresses.max()} of {self._n_bytes} bytes of shared memory")
        if (addresses % size).any():
            raise Fault(f"{source}: {size} bytes at {addresses[addresses % size != 0][0]} are not aligned")

    def load(self, who: Who, addresses: np.ndarray, size: int, source: str) -> np.ndarray:
        """Unsigned integers of ``size`` bytes; `Fault` if another warp wrote them since the last barrier."""
        places = self._places(who, addresses, size)
        if self._checks_order:
            self._check_order(who, places, self._written, np.ones(places.shape, bool), source)
            self._read[places, who.warps[:, None]] = who.barriers[:, None]
        return self._bytes[places].view(f"u{size}")[:, 0]

    def store(self, who: Who, addresses: np.ndarray, values: np.ndarray, source: str) -> None:
        """Write unsigned integers.

        `Fault` if another warp read there since the last barrier, or wrote something else: a compiler may let several
        warps that hold the same number write it.
        """
        places = self._places(who, addresses, values.dtype.itemsize)
        new = np.ascontiguousarray(values).view(np.uint8).reshape(places.shape)
        if self._checks_order:
            self._check_order(who, places, self._read, np.ones(places.shape, bool), source)
            self._check_order(who, places, self._written, self._bytes[places] != new, source)
            self._written[places, who.warps[:, None]] = who.barriers[:, None]
        self._bytes[places] = new
        if (self._bytes[places] != new).any():
            raise Fault(f"{source}: two threads write different numbers to the same shared memory")

    def _places(self, who: Who, addresses: np.ndarray, size: int) -> np.ndarray:
        """[thread, byte]: in all shared memory."""
        return (who.blocks * self._n_bytes + addresses)[:, None] + np.arange(size)

    def _check_order(self, who: Who, places: np.ndarray, done: np.ndarray, matters: np.ndarray, source: str) -> None:
        for warp in range(done.shape[1]):
            clash = matters & (done[places, warp] == who.barriers[:, None]) & (who.warps[:, None] != warp)
            if clash.any():
                other = int(who.warps[clash.any(axis=1)][0])
                raise Fault(f"{source}: no barrier between what warps {other} and {warp} do to shared memory")
