"""What a launch executes, and what it must move between memory and the chip."""

from __future__ import annotations

import numpy as np

from tests.emulated_gpu.ordering import READ

#: bytes that memory delivers at once
SECTOR = 32


class Counter:
    """Counts of one launch.

    Attributes:
        instructions: of PTX, over all threads; those whose predicate is false count, as they take their turn.
    """

    def __init__(self) -> None:
        self.instructions = 0
        self._read: list[np.ndarray] = []
        self._written: list[np.ndarray] = []

    def note(self, addresses: np.ndarray, kind: int) -> None:
        """Accesses to global memory, each within one sector."""
        (self._read if kind == READ else self._written).append(np.unique(addresses // SECTOR))

    @property
    def bytes(self) -> int:
        """Sectors read, and sectors written, each once: what a launch moves that keeps the rest in its caches."""
        return SECTOR * sum(len(np.unique(np.concatenate(x))) for x in (self._read, self._written) if x)
