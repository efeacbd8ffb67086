"""What the threads of a launch do to memory, in which nothing but barriers orders them.

Two warps of a block meet at its barriers; two blocks never meet (the kernels have no atomics with acquire or release:
see `test_triton_compiles`). So warps that touch a byte between the same two barriers of their block, and blocks that
touch a byte at all, must do the same to it: read it, add to it, or write the same number.
"""

from __future__ import annotations

import numpy as np

from tests.emulated_gpu.memory import Fault

#: what is done to a byte; a number from 0 to 255 is written to it
READ, ADD = -1, -2

_ADDRESS, _BLOCK, _BARRIERS, _WARP, _DONE, _SOURCE = range(6)


class Accesses:
    """Of one launch to one kind of memory."""

    def __init__(self) -> None:
        self._columns: list[np.ndarray] = []
        self._sources: dict[str, int] = {}

    def note(
        self, addresses: np.ndarray, size: int, who: tuple[np.ndarray, ...], done: int | np.ndarray, source: str
    ) -> None:
        """An instruction touches ``size`` bytes at each address.

        who: blocks of the threads, the barriers these have passed, and warps.  done: `READ`, `ADD`, or what is
        written, as unsigned integers.
        """
        every = (addresses[:, None] + np.arange(size)).ravel()
        what = done.view(np.uint8) if isinstance(done, np.ndarray) else done
        line = self._sources.setdefault(source, len(self._sources))
        columns = np.broadcast_arrays(every, *(np.repeat(x, size) for x in who), what, line)
        self._columns.append(np.stack(columns).astype(np.int64))

    def check(self) -> None:
        """Raise `Fault` if two blocks, or two warps between the same barriers, do different things to a byte."""
        if not self._columns:
            return
        log = np.concatenate(self._columns, axis=1)
        for place, actor in (([_ADDRESS], _BLOCK), ([_ADDRESS, _BLOCK, _BARRIERS], _WARP)):
            log = log[:, np.lexsort(log[place])]
            first = np.r_[True, (log[place][:, 1:] != log[place][:, :-1]).any(axis=0)]
            starts = np.flatnonzero(first)
            least, most = (f.reduceat(log[[actor, _DONE]], starts, axis=1) for f in (np.minimum, np.maximum))
            races = np.flatnonzero((least != most).all(axis=0))
            if len(races):
                at = starts[races[0]]
                together = log[:, at:][:, np.cumsum(first)[at:] == races[0] + 1]
                names = {line: source for source, line in self._sources.items()}
                raise Fault(f"nothing orders {' and '.join(names[line] for line in np.unique(together[_SOURCE]))}")
