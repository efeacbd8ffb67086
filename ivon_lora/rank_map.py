"""All ranks of all adapters as one vector, and those of all their tensors as another: whole lists in a few passes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ivon_lora.layout import Look, Tensors, Values, addresses, same
from ivon_lora.lora.adapters import LoraAdapter


class RankMap:
    """Which ranks of tensors belong to which ranks of adapters.

    R is the number of ranks of all adapters, T that of all their tensors, in the order of `LoraAdapter.tensors`.

    Attributes:
        params, dims: the tensors, and their rank dimensions.
        gates: those whose ranks are set to zero while pruning is soft.
        ranks: of each adapter.
        sizes: ranks of each tensor.
        counts: elements of each rank of each tensor, int64 (T,).
    """

    def __init__(self, adapters: Sequence[LoraAdapter]) -> None:
        self.params = [p for a in adapters for _, p, _ in a.tensors()]
        self.dims = [dim for a in adapters for _, _, dim in a.tensors()]
        self.gates = [a.B if a.E is None else a.E for a in adapters]
        self.ranks = [a.rank for a in adapters]
        self.sizes = [a.rank for a in adapters for _ in a.tensors()]
        elements = [p.numel() // max(size, 1) for p, size in zip(self.params, self.sizes, strict=True)]
        self.counts = np.repeat(elements, self.sizes)
        self._starts = np.cumsum([0, *self.sizes])
        tensors = np.split(np.arange(self._starts[-1]), self._starts[1:-1])  # ranks of each tensor
        own = np.split(np.arange(sum(self.ranks)), np.cumsum(self.ranks)[:-1])  # ranks of each adapter
        has_e = [a.E is not None for a in adapters]
        a_at = np.cumsum([0, *(2 + e for e in has_e)])[:-1]  # the tensors are A, B and perhaps E
        self._indices = {
            "owners": np.repeat(np.arange(len(adapters)), self.ranks),
            "spread": _joined(ranks for ranks, e in zip(own, has_e, strict=True) for _ in range(2 + e)),
            "A": _joined(tensors[i] for i in a_at),
            "B": _joined(tensors[i + 1] for i in a_at),
            "E": _joined(tensors[i + 2] for i, e in zip(a_at, has_e, strict=True) if e),
            "with E": _joined(ranks for ranks, e in zip(own, has_e, strict=True) if e),
        }
        self._on: dict[tuple[str, torch.device], Tensor] = {}

    def _index(self, name: str, device: torch.device) -> Tensor:
        """An index on a device, copied there once."""
        if (name, device) not in self._on:
            self._on[name, device] = torch.from_numpy(self._indices[name]).to(device)
        return self._on[name, device]

    def owners(self, device: torch.device) -> Tensor:
        """The adapter of each of its ranks, int64 (R,)."""
        return self._index("owners", device)

    def spread(self, values: Tensor) -> Tensor:
        """From the ranks of adapters (R,) to those of their tensors (T,)."""
        return values.index_select(0, self._index("spread", values.device))

    def add(self, values: Tensor) -> Tensor:
        """From the ranks of tensors (T,) to those of adapters (R,): A + B, then + E where there is one.

        Added one after the other, as the kernels do: a sum over a stack may take another order.
        """
        a, b, e, with_e = (self._index(name, values.device) for name in ("A", "B", "E", "with E"))
        total = values.index_select(0, a) + values.index_select(0, b)
        return total.index_add_(0, with_e, values.index_select(0, e)) if len(e) else total  # no rank twice: any order

    def place(self, position: int) -> tuple[int, int]:
        """The tensor, and which of its ranks, at a position among the ranks of all tensors."""
        tensor = int(np.searchsorted(self._starts, position, side="right")) - 1
        return tensor, position - int(self._starts[tensor])


def _joined(parts: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([*parts, np.empty(0, np.int64)])


class SharedEntry:
    """An entry that the state of many parameters has, as parts of one tensor, so that all are written in one go.

    Args:
        name: of the entry.
        sizes: elements of each part.
        fill: value of those that are not there yet; its type decides the dtype.
    """

    def __init__(self, name: str, sizes: Sequence[int], fill: float | bool) -> None:
        self._name, self._sizes, self._fill = name, list(sizes), fill
        self._made: _Made | None = None

    def of(self, entries: Sequence[dict[str, Any]], device: torch.device) -> Tensor:
        """The tensor whose parts the entries are; where somebody has put others there, it is made of them first."""
        if self._made is None or not self._made.is_there(entries):
            found = [
                torch.full((size,), self._fill, device=device) if (x := entry.get(self._name)) is None else x
                for entry, size in zip(entries, self._sizes, strict=True)
            ]
            whole = torch.cat(found)
            parts = list(whole.split(self._sizes))
            for entry, part in zip(entries, parts, strict=True):
                entry[self._name] = part
            self._made = _Made(whole, entries, Look.values(entries, self._name), Look.tensors(parts), addresses(parts))
        return self._made.whole

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}  # the entries of a copy are others


@dataclass(frozen=True)
class _Made:
    """A shared entry as it was made.

    Attributes:
        whole: the tensor.
        entries, values: where its parts are.
        parts, places: they, and their addresses, for their `.data` may be exchanged.
    """

    whole: Tensor
    entries: Sequence[dict[str, Any]]
    values: Values
    parts: Tensors
    places: np.ndarray

    def is_there(self, entries: Sequence[dict[str, Any]]) -> bool:
        """Whether the entries are still its parts."""
        return (
            same(entries, self.entries) and self.values.are_there() and self.parts.lie_at(self.places, self.whole.dtype)
        )
