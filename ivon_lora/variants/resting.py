"""Ranks at rest: a step leaves their weights as they are, and all that the optimizer knows of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from ivon_lora.optim.ivon import IVON
from ivon_lora.optim.sharding import local, local_grad, mask_part, part_of, whole

#: a tensor of an adapter, its rank dimension, and bool (r,): which ranks are meant
Ranks = tuple[Tensor, int, Tensor]


class Resting:
    """Puts ranks at rest for one step of any optimizer: `hold` in ``before_step``, `release` in ``after_step``.

    A gradient of zero is not rest: AdamW's momentum and decay move the rank all the same, and a curvature would fall.

    Args:
        optimizer: whose steps.
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
                values = {"": mean_of(self._optimizer, p), **dict(rank_state(self._optimizer, p))}
                kept = {name: value.index_select(dim, rows) for name, value in values.items()}
                self._kept.append((p, dim, rows, kept))

    def release(self) -> None:
        """Bring them back as they were; what the optimizer has made of them meanwhile is zero, as for a new rank."""
        for p, dim, rows, kept in self._kept:
            local(p).detach().index_copy_(dim, rows, kept[""].to(p.dtype))
            for name, value in rank_state(self._optimizer, p):
                source = kept[""] if name == "mean" else kept.get(name)
                value.index_copy_(dim, rows, value.index_select(dim, rows) * 0 if source is None else source)
        self._kept = []


def zero_gradients(ranks: Iterable[Ranks]) -> None:
    """The papers' way to rest: the gradients of these ranks are set to zero."""
    for p, dim, rests in ranks:
        grad = local_grad(p)
        if grad is not None:
            grad.index_fill_(dim, rows_of(p, dim, rests), 0.0)


def without_noise(optimizer: Optimizer, ranks: Iterable[Ranks]) -> None:
    """While IVON holds a sample: let these ranks be their mean in it."""
    if not isinstance(optimizer, IVON) or not optimizer.is_sampled:
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


def rank_state(optimizer: Optimizer, p: Tensor) -> Iterator[tuple[str, Tensor]]:
    """All state tensors of the shape of ``p`` (moments, Hessian, means), the parts in this process.

    Write to them with ``index_copy_`` or ``index_fill_``: indexing by a mask gives a copy.
    """
    for name, value in optimizer.state.get(p, {}).items():
        if isinstance(value, torch.Tensor) and value.shape == p.shape:
            yield name, local(value)


def whole_values(optimizer: Optimizer, p: Tensor) -> dict[str, Tensor]:
    """Copies of a parameter, under "", and of all state of its shape; of sharded ones the whole."""
    state = {n: v for n, v in optimizer.state.get(p, {}).items() if isinstance(v, Tensor) and v.shape == p.shape}
    return {name: whole(value.detach()).clone() for name, value in {"": p, **state}.items()}


def write_values(optimizer: Optimizer, p: Tensor, values: Mapping[str, Tensor]) -> None:
    """Write what `whole_values` gave, in MEAN; each process its part."""
    for name, value in values.items():
        local(optimizer.state[p][name] if name else p).detach().copy_(part_of(p, value))
