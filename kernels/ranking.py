"""Where the scores of all ranks add up, and the adapters they belong to, on the device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ivon_lora.kernels import select, sums

#: `ivon_lora.backends.Ranking` and `RankedTensor`, which this room may not know
Ranking = Any
RankedTensor = Any

_data_ptr: Any = torch._C.TensorBase.data_ptr


@dataclass(frozen=True)
class RankLayout:
    """Tables of the adapters; they stay where they are as long as shapes and addresses of the adapters do.

    Attributes:
        fingerprint: what they depend on.
        memory, places: the tensors of the adapters that they point to, and where those were.
        tensors: index of a parameter -> the tensor of an adapter that it is.
        slots: index of a parameter -> the first of its slots among the sums.
        numbers_of_adapters: index of a parameter -> number of its adapter.
        gates: indices of the parameters that are the gate of an adapter.
        n_ranks, n_slots: of all adapters together.
        sums: int64 [sums.ROWS, n_slots], zeros between two steps.
        done: int32 [1], programs that have finished, 0 between two launches.
        adapters, owners, keys: see `select`.
        numbers: int64 [SELECTION_COLUMNS], the scalars of the selection.
    """

    fingerprint: list[Any]
    memory: list[Tensor]
    places: np.ndarray
    tensors: dict[int, RankedTensor]
    slots: dict[int, int]
    numbers_of_adapters: dict[int, int]
    gates: frozenset[int]
    n_ranks: int
    n_slots: int
    sums: Tensor
    done: Tensor
    adapters: Tensor
    owners: Tensor
    keys: Tensor
    numbers: Tensor

    @property
    def tables(self) -> tuple[Any, ...]:
        """Arguments of `score_kernel` and `select_kernel`."""
        return self.sums, self.adapters, self.owners, self.keys, self.numbers

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Arguments of `step_kernel`."""
        return self.sums, self.n_slots, self.done, self.adapters, self.owners, self.keys, self.numbers

    @property
    def is_in_place(self) -> bool:
        """Whether everything in `memory` still is where it was."""
        return np.array_equal(_addresses(self.memory), self.places)

    def clear(self) -> None:
        """Forget what an interrupted step has left."""
        self.sums.zero_()
        self.done.zero_()
        self.adapters[:, select.FINISHED.value] = 0


def no_ranking(dummy: Tensor) -> tuple[Any, ...]:
    """Arguments of `step_kernel` that nothing reads."""
    return dummy, 0, dummy, dummy, dummy, dummy, dummy


def fingerprint(ranking: Ranking) -> list[Any]:
    """What a `RankLayout` depends on."""
    out: list[Any] = []
    for adapter in ranking.adapters:
        for t in adapter:
            addresses = t.scores.data_ptr(), t.mask.data_ptr(), _address(t.sensitivity), _address(t.uncertainty)
            out.append((t.index, t.shape, t.rank_dim, t.gate, addresses))
        out.append(None)
    return out


def _addresses(tensors: list[Tensor]) -> np.ndarray:
    return np.fromiter(map(_data_ptr, tensors), np.int64, len(tensors))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def rank_layout(ranking: Ranking, device: torch.device) -> RankLayout:
    """The tables of a ranking's adapters."""
    rows, slots, numbers, first, slot = [], {}, {}, 0, 0
    for number, adapter in enumerate(ranking.adapters):
        r = adapter[0].shape[adapter[0].rank_dim]
        row = [first, r]
        for tensor in adapter:
            count = math.prod(tensor.shape) // r
            row += [slot, count, tensor.scores.data_ptr(), tensor.mask.data_ptr()]
            slots[tensor.index], numbers[tensor.index] = slot, number
            slot += r
        row += [-1, 1, 0, 0] * (3 - len(adapter)) + [0]
        rows.append(row)
        first += r
    table = np.array(rows, np.int64)
    owners = np.repeat(np.arange(len(rows)), table[:, select.RANKS.value])
    tensors = {tensor.index: tensor for adapter in ranking.adapters for tensor in adapter}
    used = [(t.scores, t.mask, t.sensitivity, t.uncertainty) for t in tensors.values()]
    memory = [t for some in used for t in some if t is not None]
    return RankLayout(
        fingerprint=fingerprint(ranking),
        memory=memory,
        places=_addresses(memory),
        tensors=tensors,
        slots=slots,
        numbers_of_adapters=numbers,
        gates=frozenset(index for index, tensor in tensors.items() if tensor.gate),
        n_ranks=first,
        n_slots=slot,
        sums=torch.zeros(sums.ROWS.value, slot, dtype=torch.int64, device=device),
        done=torch.zeros(1, dtype=torch.int32, device=device),
        adapters=torch.from_numpy(table).to(device),
        owners=torch.from_numpy(owners).to(device),
        keys=torch.empty(2 * first, dtype=torch.int32, device=device),
        numbers=torch.empty(select.SELECTION_COLUMNS.value, dtype=torch.int64, device=device),
    )
