"""How tensors lie in memory, asked of whole lists at once.

Reading one attribute of one tensor costs Python some 0.1 us, and several times that when the tensor is not in the
caches, as after a step over large ones. So no more is asked than must be, and never tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor

_BASE: Any = torch._C.TensorBase
_address, _dtype, _is_contiguous = _BASE.data_ptr, _BASE.dtype.__get__, _BASE.is_contiguous

#: whether a tensor is sparse
is_sparse: Callable[[Tensor], bool] = _BASE.is_sparse.__get__

#: its gradient
grad_of: Callable[[Tensor], Tensor | None] = _BASE.grad.__get__

_requires_grad: Callable[[Tensor], bool] = _BASE.requires_grad.__get__


def same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two sequences hold the same objects, in the same order."""
    return a is b or (len(a) == len(b) and all(map(is_, a, b)))


def trainable(params: list[Tensor]) -> list[Tensor]:
    """Those that require a gradient; the same list when all do."""
    return params if all(map(_requires_grad, params)) else [p for p in params if p.requires_grad]


def addresses(tensors: Sequence[Tensor]) -> np.ndarray:
    """Addresses of the first elements, int64 (n,).

    Raises:
        RuntimeError: a tensor has no memory of its own (it is sparse).
    """
    return np.fromiter(map(_address, tensors), np.int64, len(tensors))


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
