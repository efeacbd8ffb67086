"""The works of one backend call, with the addresses of their tensors as a table that is cheap to refresh."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
from torch import Tensor

from ivon_lora.backends import Work
from ivon_lora.layout import addresses

#: rows of the table: the addresses (0 for none) of these attributes of the works, then numbers
ADDRESSES = (
    "param",
    "mean",
    "momentum",
    "hess",
    "grad",
    "mean_state",
    "banked_grad",
    "banked_curvature",
    "rank_mask",
    "mean_copy",
    "own_decay",
)
NUMBERS = ("numel", "index", "ranks", "inner", "offset")
ROWS = (*ADDRESSES, *NUMBERS)

GRAD = ADDRESSES.index("grad")


class Batch(list[Work]):
    """Works of parameters that share their hyperparameters.

    A backend may treat it as the list it is. Those that want addresses find them in ``table``, and keep what they
    derive from the works in ``cache``.

    Attributes:
        ROLES: `ADDRESSES`, for those who may not know this room.
        table: int64 (len(ROWS), n), one column per work. ``ranks`` and ``inner`` are the number of ranks of the
            mask and of the elements behind one index of it, 1 without a mask.
        cache: whatever a backend wants to find again. It is emptied when more than addresses has changed.
        gradients: those lent for the call that is being made; the works have them only after `hand_out`.
        alike: whether these have the dtype of their parameters.
    """

    ROLES = ADDRESSES

    def __init__(self, works: Iterable[Work]) -> None:
        super().__init__(works)
        self.table = np.zeros((len(ROWS), len(self)), np.int64)
        self.cache: dict[str, Any] = {}
        self.gradients: Sequence[Tensor | None] = ()
        self.alike = False
        for role in ADDRESSES:
            self.read(role)
        numbers = [(w.hess.numel(), w.index, *_rank_sizes(w), w.offset) for w in self]
        self.table[len(ADDRESSES) :] = np.array(numbers, np.int64).reshape(-1, len(NUMBERS)).T

    def row(self, name: str) -> np.ndarray:
        """One row of the table."""
        return self.table[ROWS.index(name)]

    def read(self, role: str) -> None:
        """Read the addresses of one role of `ADDRESSES` again."""
        tensors = list(map(attrgetter(role), self))
        try:
            self.table[ADDRESSES.index(role)] = addresses(tensors)
        except TypeError:  # some are None
            self.table[ADDRESSES.index(role)] = [0 if t is None else t.data_ptr() for t in tensors]

    def give(self, role: str, tensors: Sequence[Tensor]) -> None:
        """Give every work a tensor for one role of `ADDRESSES`."""
        for work, tensor in zip(self, tensors, strict=True):
            setattr(work, role, tensor)
        self.table[ADDRESSES.index(role)] = addresses(tensors)

    def forget(self, role: str) -> None:
        """Let the tensors of one role of `ADDRESSES` go."""
        for work in self:
            setattr(work, role, None)
        self.table[ADDRESSES.index(role)] = 0

    def lend(self, gradients: Sequence[Tensor | None], places: np.ndarray, alike: bool) -> None:
        """Lend the works contiguous gradients, which lie at ``places``."""
        self.gradients, self.alike = gradients, alike
        self.table[GRAD] = places

    def hand_out(self) -> None:
        """Give every work the gradient that it was lent, for those who read works and not the table."""
        for work, gradient in zip(self, self.gradients, strict=False):
            work.grad = gradient

    def take_back(self) -> None:
        """Let the gradients go: they are not the optimizer's to keep."""
        if len(self) and self[0].grad is not None:
            self.forget("grad")
        self.gradients, self.alike = (), False
        self.table[GRAD] = 0

    @staticmethod
    def of(works: Sequence[Work]) -> Batch:
        """The works as a batch, as they are if they are one."""
        return works if isinstance(works, Batch) else Batch(works)


def _rank_sizes(work: Work) -> tuple[int, int]:
    if work.rank_mask is None:
        return 1, 1
    return len(work.rank_mask), math.prod(work.param.shape[work.rank_dim + 1 :])
