"""Ranks at rest: a step leaves their weights as they are, and all that the optimizer knows of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from ivon_lora.lora.adapters import LoraAdapter
from ivon_lora.optim.ivon import IVON
from ivon_lora.optim.sharding import local, local_grad, mask_part, part_of, whole

#: a tensor of an adapter, its rank dimension, and bool (r,): which ranks are meant
Ranks = tuple[Tensor, int, Tensor]


def all_ranks(adapters: Iterable[LoraAdapter]) -> list[Ranks]:
    """Every rank of some adapters."""
    return [(p, dim, torch.ones(a.rank, dtype=torch.bool)) for a in adapters for _, p, dim in a.tensors()]


class Resting:
    """Puts ranks at rest for one step of any optimizer: `hold` in ``before_step``, `release` in ``after_step``.

    A gradient of zero is not rest: AdamW's momentum and decay move the rank all the same, and a curvature would fall.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._kept: list[tuple[Tensor, int, Tensor, dict[str, Tensor]]] = []

    def hold(self, ranks: Iterable[Ranks]) -> None:
        """Remember the ranks that are to rest."""
        self._kept = []
        for p, dim, rests in ranks:
            rows = rows_of(p, dim, rests)
            if len(rows):
                values = {**tensors_of(self._optimizer, p), "": mean_of(self._optimizer, p)}
                self._kept.append((p, dim, rows, {n: local(v).index_select(dim, rows) for n, v in values.items()}))

    def release(self) -> None:
        """Bring them back as they were; what the optimizer has made of them meanwhile is zero, as for a new rank."""
        for p, dim, rows, kept in self._kept:
            for name, value in tensors_of(self._optimizer, p).items():
                source = kept.get("" if name == "mean" else name)
                if source is None:
                    local(value).index_fill_(dim, rows, 0)
                else:
                    local(value).index_copy_(dim, rows, source.to(value.dtype))
        self._kept = []


def zero_gradients(ranks: Iterable[Ranks]) -> None:
    """The papers' way to rest: the gradients of these ranks are set to zero."""
    for p, dim, rests in ranks:
        grad = local_grad(p)
        if grad is not None:
            grad.index_fill_(dim, rows_of(p, dim, rests), 0.0)


def without_noise(optimizer: Optimizer, ranks: Sequence[Ranks]) -> None:
    """While IVON holds a sample: let these ranks be their mean in it."""
    if not ranks or not isinstance(optimizer, IVON) or not optimizer.is_sampled:
        return
    optimizer.sampling.settle()
    for p, dim, rests in ranks:
        rows = rows_of(p, dim, rests)
        mean = mean_of(optimizer, p).index_select(dim, rows)
        local(p).detach().index_copy_(dim, rows, mean.to(p.dtype))
    optimizer.sampling.seal()  # it is the sample that was changed, not the mean


def rows_of(p: Tensor, dim: int, ranks: Tensor) -> Tensor:
    """Indices of ranks, bool (r,), along the rank dimension of the part of ``p`` in this process."""
    return mask_part(p, ranks.to(p.device), dim).nonzero().flatten()


def mean_of(optimizer: Optimizer, p: Tensor) -> Tensor:
    """The parameter, or its mean where IVON holds a sample; the part in this process."""
    return optimizer.parameters.mean_of(p) if isinstance(optimizer, IVON) else local(p).detach()


def tensors_of(optimizer: Optimizer, p: Tensor) -> dict[str, Tensor]:
    """A parameter, under "", and all state tensors of its shape (moments, Hessian, means), by name.

    Write to them with ``index_copy_`` or ``index_fill_``: indexing by a mask gives a copy.
    """
    state = optimizer.state.get(p, {})
    return {"": p.detach(), **{n: v for n, v in state.items() if isinstance(v, Tensor) and v.shape == p.shape}}


def whole_values(optimizer: Optimizer, p: Tensor) -> dict[str, Tensor]:
    """Copies of `tensors_of`; of sharded ones the whole."""
    return {name: whole(value).clone() for name, value in tensors_of(optimizer, p).items()}


def write_values(optimizer: Optimizer, p: Tensor, values: Mapping[str, Tensor]) -> None:
    """Write what `whole_values` gave, in MEAN; each process its part."""
    targets = tensors_of(optimizer, p)
    for name, value in values.items():
        local(targets[name]).copy_(part_of(p, value))
