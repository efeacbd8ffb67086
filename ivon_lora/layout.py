"""How tensors lie in memory, asked of whole lists at once.

Reading one attribute of one tensor costs Python some 0.1 us, and several times that when the tensor is not in the
caches, as after a step over large ones. So no more is asked than must be, and never tensor by tensor.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor

_BASE: Any = torch._C.TensorBase
_address, _dtype, _is_contiguous = _BASE.data_ptr, _BASE.dtype.__get__, _BASE.is_contiguous
_version: Callable[[Tensor], int] = _BASE._version.__get__

#: whether a tensor is sparse
is_sparse: Callable[[Tensor], bool] = _BASE.is_sparse.__get__

#: its gradient
grad_of: Callable[[Tensor], Tensor | None] = _BASE.grad.__get__

_requires_grad: Callable[[Tensor], bool] = _BASE.requires_grad.__get__


def same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two sequences hold the same objects, in the same order."""
    return a is b or (len(a) == len(b) and all(map(is_, a, b)))


def equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays have the same shape and bytes. For small ones it costs a fraction of `np.array_equal`."""
    return a.shape == b.shape and a.tobytes() == b.tobytes()


def is_constant(a: np.ndarray) -> bool:
    """Whether all elements have the same bytes; there is at least one."""
    found = a.tobytes()
    return found == found[: a.itemsize] * len(a)


def addresses(tensors: Sequence[Tensor]) -> np.ndarray:
    """Addresses of the first elements, int64 (n,).

    Raises:
        RuntimeError: a tensor has no memory of its own (it is sparse).
    """
    return np.fromiter(map(_address, tensors), np.int64, len(tensors))


def put(values: np.ndarray, places: np.ndarray) -> None:
    """Write one number, fp32 (n,), to each of some addresses in the memory of the host, int64 (n,); both contiguous."""
    size = values.itemsize
    start = values.ctypes.data
    for place, source in zip(places.tolist(), range(start, start + len(values) * size, size), strict=True):
        ctypes.memmove(place, source, size)


def plain_addresses(tensors: Sequence[Tensor], dtype: torch.dtype) -> np.ndarray | None:
    """The same of contiguous tensors of one dtype; None where one of them is something else."""
    try:
        if not all_contiguous(tensors) or not dtypes(tensors) <= {dtype}:
            return None
        return addresses(tensors)
    except RuntimeError:  # a sparse one
        return None


def all_contiguous(tensors: Iterable[Tensor]) -> bool:
    """Whether all are."""
    return all(map(_is_contiguous, tensors))


def dtypes(tensors: Iterable[Tensor]) -> set[torch.dtype]:
    """The dtypes that occur."""
    return set(map(_dtype, tensors))


@dataclass(frozen=True)
class Seen:
    """Contiguous tensors of one dtype, as they lay at one look.

    Attributes:
        tensors: those that were looked at.
        places: their addresses.
    """

    tensors: Sequence[Tensor]
    places: np.ndarray
    dtype: torch.dtype


@dataclass(frozen=True)
class Gradients(Seen):
    """Gradients as they lay at one look; ``tensors`` are kept alive as long as this is.

    Attributes:
        params: the parameters at that look, if they could be seen.
    """

    params: Seen | None


class Tensors:
    """Tensors that are looked at again and again.

    Args:
        tensors: nobody changes this list.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self.list = tensors

    def addresses(self) -> np.ndarray:
        """See `addresses`. The array is good until the next look."""
        return addresses(self.list)

    def plain_addresses(self, dtype: torch.dtype) -> np.ndarray | None:
        """See `plain_addresses`. The array is good until the next look."""
        return plain_addresses(self.list, dtype)

    def lie_at(self, places: np.ndarray, dtype: torch.dtype) -> bool:
        """Whether they are contiguous, of this dtype, and at these addresses, int64 (n,)."""
        now = self.plain_addresses(dtype)
        return now is not None and equal(now, places)

    def all_train(self) -> tuple[bool, Seen | None]:
        """Whether all require a gradient, and how they lie, if that was seen on the way: good until the next look."""
        return all(map(_requires_grad, self.list)), None

    def gradients(self) -> Gradients | None:
        """Those of all, if all train and that is quickly found out; None: look at one after the other."""
        return None

    def were_written(self) -> None:
        """Tell autograd, which cannot see it."""
        torch.autograd.graph.increment_version(self.list)

    def versions(self) -> np.ndarray:
        """How often autograd was told, or saw it itself: int64 (n,)."""
        return np.fromiter(map(_version, self.list), np.int64, len(self.list))


class Values:
    """What some dictionaries hold under some names.

    Attributes:
        known: what they held when this was made, dictionary by dictionary.
    """

    def __init__(self, dictionaries: Sequence[dict[str, Any]], *names: str) -> None:
        self.dictionaries, self.names = dictionaries, names
        self.known = self.now()

    def now(self) -> list[Any]:
        """What they hold now; None where there is nothing."""
        return [d.get(name) for d in self.dictionaries for name in self.names]

    def are_there(self) -> bool:
        """Whether these are still the same objects."""
        return same(self.now(), self.known)


class Objects:
    """What a list held, or a dictionary under its keys, in order.

    Attributes:
        known: these objects.
    """

    def __init__(self, holder: list[Any] | dict[Any, Any]) -> None:
        self.known = list(_held(holder))

    def are_in(self, holder: list[Any] | dict[Any, Any]) -> bool:
        """Whether it holds these objects and no others, in this order."""
        return same(_held(holder), self.known)


def _held(holder: list[Any] | dict[Any, Any]) -> list[Any]:
    return list(holder.values()) if isinstance(holder, dict) else holder


class Look:
    """How lists are looked at in this process, from now on.

    Attributes:
        tensors, values, objects, put: `Tensors`, `Values`, `Objects` and `put`, or something quicker that does the
            same.
    """

    tensors: type[Tensors] = Tensors
    values: type[Values] = Values
    objects: type[Objects] = Objects
    put: Callable[[np.ndarray, np.ndarray], None] = staticmethod(put)
