"""The works of one backend call, with the addresses of their tensors as a table that is cheap to refresh.

Reading one attribute of one tensor costs Python some 0.1 us, so what is asked of every tensor in every step is asked
for whole lists at once, and no more than that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from operator import attrgetter, is_
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ivon_lora.backends import Work

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

_BASE: Any = torch._C.TensorBase
_address, _dtype, _is_contiguous = _BASE.data_ptr, _BASE.dtype.__get__, _BASE.is_contiguous


def same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two sequences hold the same objects, in the same order."""
    return a is b or (len(a) == len(b) and all(map(is_, a, b)))


def addresses(tensors: Sequence[Tensor]) -> np.ndarray:
    """Addresses of the first elements, int64 (n,).

    Raises:
        RuntimeError: a tensor has no memory of its own (it is sparse).
    """
    return np.fromiter(map(_address, tensors), np.int64, len(tensors))


def all_contiguous(tensors: Iterable[Tensor]) -> bool:
    """Whether all are."""
    return all(map(_is_contiguous, tensors))


def dtypes(tensors: Iterable[Tensor]) -> set[torch.dtype]:
    """The dtypes that occur."""
    return set(map(_dtype, tensors))


class Batch(list[Work]):
    """Works of parameters that share their hyperparameters.

    A backend may treat it as the list it is. Those that want addresses find them in ``table``, and keep what they
    derive from the works in ``cache``.

    Attributes:
        ROLES: `ADDRESSES`, for those who may not know this room.
        table: int64 (len(ROWS), n), one column per work. ``ranks`` and ``inner`` are the number of ranks of the
            mask and of the elements behind one index of it, 1 without a mask.
        cache: whatever a backend wants to find again. It is emptied when more than addresses has changed.
    """

    ROLES = ADDRESSES

    def __init__(self, works: Iterable[Work]) -> None:
        super().__init__(works)
        self.table = np.zeros((len(ROWS), len(self)), np.int64)
        self.cache: dict[str, Any] = {}
        for role in ADDRESSES:
            self.read(role)
        numbers = [(w.hess.numel(), w.index, *_rank_sizes(w), w.offset) for w in self]
        self.table[len(ADDRESSES) :] = np.array(numbers, np.int64).reshape(-1, len(NUMBERS)).T

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

    @staticmethod
    def of(works: Sequence[Work]) -> Batch:
        """The works as a batch, as they are if they are one."""
        return works if isinstance(works, Batch) else Batch(works)


def _rank_sizes(work: Work) -> tuple[int, int]:
    if work.rank_mask is None:
        return 1, 1
    return len(work.rank_mask), math.prod(work.param.shape[work.rank_dim + 1 :])
