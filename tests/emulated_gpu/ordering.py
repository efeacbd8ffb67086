"""Which accesses to global memory happen before which others, by vector clocks; the others must not conflict.

A warp's time is cut into epochs, which end where it lets others know what it did: at a barrier of its block, and at an
atomic with release semantics. A warp knows so many epochs of each other warp. An access of warp u in its epoch k
happens before one of warp v if v knows more than k epochs of u.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tests.emulated_gpu.memory import Fault

READ, WRITE, ATOMIC = range(3)


@dataclass
class _Log:
    """Accesses in columns: 32-bit word, its bytes as bits, warp, epoch, kind, line of the program."""

    columns: list[np.ndarray] = field(default_factory=list)
    sources: dict[str, int] = field(default_factory=dict)


class Ordering:
    """Of the warps of one launch."""

    def __init__(self, n_blocks: int, warps_per_block: int) -> None:
        self._per_block = warps_per_block
        n_warps = n_blocks * warps_per_block
        self._known = np.zeros((n_warps, n_warps), np.int32)
        self._history = [[row.copy()] for row in self._known]
        self._released: dict[int, np.ndarray] = {}
        self._log = _Log()

    def _end_epoch(self, warp: int) -> None:
        self._known[warp, warp] += 1

    def _begin_epoch(self, warp: int) -> None:
        self._history[warp].append(self._known[warp].copy())

    def barrier(self, block: int) -> None:
        """All warps of a block have met."""
        warps = range(block * self._per_block, (block + 1) * self._per_block)
        for warp in warps:
            self._end_epoch(warp)
        self._known[warps.start : warps.stop] = self._known[warps.start : warps.stop].max(axis=0)
        for warp in warps:
            self._begin_epoch(warp)

    def acquire_release(self, warp: int, address: int) -> None:
        """An atomic with both semantics: knows what earlier ones there knew, and lets later ones know."""
        known = self._known[warp]
        np.maximum(known, self._released.get(address, 0), out=known)
        self._end_epoch(warp)
        self._released[address] = known.copy()
        self._begin_epoch(warp)

    def note(self, warps: np.ndarray, addresses: np.ndarray, size: int, kind: int, source: str) -> None:
        """Accesses of ``size`` bytes, one per thread."""
        line = self._log.sources.setdefault(source, len(self._log.sources))
        epochs = self._known[warps, warps]
        for word in range(max(1, size // 4)):
            touched = ((1 << min(size, 4)) - 1) << (addresses % 4)
            columns = np.broadcast_arrays(addresses // 4 + word, touched, warps, epochs, kind, line)
            self._log.columns.append(np.stack(columns).astype(np.int64))

    def check(self) -> None:
        """Raise `Fault` if two accesses to the same bytes conflict: no order, different warps, one of them a write.

        Two atomics do not conflict.
        """
        if not self._log.columns:
            return
        log = np.concatenate(self._log.columns, axis=1)
        log = log[:, np.lexsort(log[::-1])]
        new = np.ones(log.shape[1], bool)
        new[1:] = (log[:, 1:] != log[:, :-1]).any(axis=0)  # the threads of a warp, and loops
        log = log[:, new]
        starts = np.flatnonzero(np.r_[True, log[0, 1:] != log[0, :-1]])
        sizes = np.diff(np.r_[starts, log.shape[1]])
        shared = np.minimum.reduceat(log[2], starts) != np.maximum.reduceat(log[2], starts)
        shared &= np.maximum.reduceat(log[4], starts) > READ
        known = self._known_by_epoch()
        for size in np.unique(sizes[shared]):
            words = starts[shared & (sizes == size)]
            for some in np.array_split(words, -(-len(words) * size**2 // 10**6)):
                self._check_words(log[:, some[:, None] + np.arange(size)], known)

    def _known_by_epoch(self) -> np.ndarray:
        """[v, e, u]: epochs of warp u that warp v knows in its epoch e."""
        known = np.zeros((len(self._history), max(map(len, self._history)), len(self._history)), np.int32)
        for warp, rows in enumerate(self._history):
            known[warp, : len(rows)] = rows
        return known

    def _check_words(self, log: np.ndarray, known: np.ndarray) -> None:
        """log: [column, word, access]."""
        _, touched, warps, epochs, kinds, lines = log
        one, other = (..., slice(None), None), (..., None, slice(None))
        before = known[warps[other], epochs[other], warps[one]] > epochs[one]  # [word, i, j]: i happens before j
        conflict = (kinds[one] != kinds[other]) | (kinds[one] == WRITE)
        conflict &= (warps[one] != warps[other]) & ((touched[one] & touched[other]) != 0)
        races = np.argwhere(conflict & ~before & ~before.transpose(0, 2, 1))
        if len(races):
            word, i, j = races[0]
            names = {line: source for source, line in self._log.sources.items()}
            raise Fault(
                f"nothing orders {names[lines[word, i]]} of warp {warps[word, i]} and {names[lines[word, j]]} of warp "
                f"{warps[word, j]}, at least one of which writes"
            )
