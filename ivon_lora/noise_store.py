"""The normals of the live sample, kept from `train()` to `step()` where there is room: drawing them costs more.

What is kept is found by its address (key, parameters, elements), so it can be forgotten at any time and is never wrong:
who does not find it draws it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ivon_lora.functional.noise import NoiseKey

#: bytes that one backend may keep
LIMIT = 64 << 20


class NoiseStore:
    """Normals of one draw, and of its mirror image.

    Attributes:
        bytes_kept: bytes of memory in use.
    """

    def __init__(self) -> None:
        self.bytes_kept = 0
        self._key: NoiseKey | None = None
        self._kept: dict[bytes, np.ndarray] = {}
        self._room = np.empty(0, np.float32)

    def open(self, key: NoiseKey, places: Sequence[tuple[bytes, int]]) -> None:
        """Make room for a draw, as far as the limit allows; normals of other draws are forgotten.

        Draws for prediction are not kept, since no step follows them.

        Args:
            places: addresses, each with its number of elements.
        """
        if not self._begin(key):
            return
        self.bytes_kept -= self._room.nbytes
        missing = sum(size for address, size in places if address not in self._kept)
        self._room = np.empty(max(min(missing, (LIMIT - self.bytes_kept) // 4), 0), np.float32)
        self.bytes_kept += self._room.nbytes

    def _begin(self, key: NoiseKey) -> bool:
        """Forget other draws; False if this one is not kept either."""
        key = _plain(key)
        if key != self._key:
            self.clear()
            self._key = None if key.prediction else key
        return not key.prediction

    def find(self, key: NoiseKey, address: bytes) -> np.ndarray | None:
        """Normals kept under an address, those of a draw that is not mirrored; None where there are none."""
        return self._kept.get(address) if _plain(key) == self._key else None

    def keep(self, key: NoiseKey, address: bytes, elements: int) -> np.ndarray | None:
        """Memory for normals of a draw that was opened, found under this address from now on; None without room."""
        if _plain(key) != self._key or len(self._room) < elements:
            return None
        self._kept[address], self._room = self._room[:elements], self._room[elements:]
        return self._kept[address]

    def some(self, key: NoiseKey, address: bytes, elements: int) -> tuple[np.ndarray, bool]:
        """Memory for the first ones of a draw's elements, as many as the limit allows, and whether they are there.

        If they are not, the caller must write them.
        """
        if not self._begin(key):
            return np.empty(0, np.float32), False
        if address in self._kept:
            return self._kept[address], True
        memory = self._kept[address] = np.empty(max(min(elements, (LIMIT - self.bytes_kept) // 4), 0), np.float32)
        self.bytes_kept += memory.nbytes
        return memory, False

    def clear(self) -> None:
        """Forget everything."""
        self._key, self._kept, self._room, self.bytes_kept = None, {}, np.empty(0, np.float32), 0


def _plain(key: NoiseKey) -> NoiseKey:
    return replace(key, mirrored=False) if key.mirrored else key
