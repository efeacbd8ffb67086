"""Parameters over the same memory: PEFT's ``ensure_weight_tying``, two adapters on one tensor.

They are one parameter: the first one has the state, the noise and the update, and the gradients of all are its own.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.nn.parameter import is_lazy

from ivon_lora.lora.adapters import identity


class TiedParameters:
    """Which parameters are others of the same optimizer, seen again, perhaps transposed.

    Args:
        params: all parameters, in order.

    Raises:
        ValueError: two share memory in another way: one as a piece of the other's elements.
    """

    def __init__(self, params: Iterable[Tensor] = ()) -> None:
        self._pairs: list[tuple[Tensor, Tensor]] = []
        first: dict[object, Tensor] = {}
        for p in params:
            if is_lazy(p):
                continue
            owner = first.setdefault(identity(p), p)
            if owner is p:
                continue
            if p.numel() != owner.numel() or p.dtype != owner.dtype:
                raise ValueError(
                    f"parameters of shapes {tuple(owner.shape)} and {tuple(p.shape)} share memory, and one is not the "
                    "other or its transpose; pass a copy of one of them"
                )
            self._pairs.append((owner, p))

    def __bool__(self) -> bool:
        return bool(self._pairs)

    def others(self, p: Tensor) -> list[Tensor]:
        """The other parameters over the memory of ``p``; moving a model to another device may have parted them."""
        return [other for owner, other in self._pairs if owner is p and identity(other) == identity(p)]

    def is_other(self, p: Tensor) -> bool:
        """Whether a parameter is an earlier one again."""
        return any(other is p and identity(owner) == identity(p) for owner, other in self._pairs)


def seen_as(values: Tensor, of: Tensor, to: Tensor) -> Tensor:
    """Values laid out as the parameter ``of``, laid out as the parameter ``to`` over the same memory."""
    is_turned = of.dim() == 2 and (of.shape, of.stride()) != (to.shape, to.stride())
    return values.t() if is_turned else values


def exchange_memory(p: Tensor, others: list[Tensor], memory: Tensor) -> None:
    """Give a parameter, and those that share its memory, other memory."""
    views = [seen_as(memory, p, other) for other in others]
    for tensor, values in zip((p, *others), (memory, *views), strict=True):
        tensor.data = values
