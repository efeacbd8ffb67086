"""One parameter, one driver: the optimizer that was made last for a parameter is the one that samples and updates it.

A notebook cell that is run again, a sweep, a second stage of training with another optimizer: the one before would go
on drawing samples into weights that are no longer its own. It gives the mean back, and leaves the parameter alone.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

if TYPE_CHECKING:
    from ivon_lora.optim.ivon import IVON

SPREAD = (
    "ZeroRedundancyOptimizer leaves each process a part of the parameters, and only these would hold a sample there; "
    "give IVON or VAdam all of them, or spread them together with the model (fully_shard)"
)

_ours: weakref.WeakSet[IVON] = weakref.WeakSet()


def take_over(optimizer: IVON, params: Iterable[Tensor]) -> None:
    """From now on ``optimizer`` drives these parameters; their drivers before give the mean back."""
    _watch_other_optimizers()
    ids = {id(p) for p in params}
    _supersede(ids, optimizer)
    optimizer.superseded -= ids
    _ours.add(optimizer)


def first_free_index(optimizer: IVON, model: nn.Module) -> int:
    """The noise index that follows those of other optimizers that are attached and drive parameters of the model."""
    ids = {id(p) for p in model.parameters()}
    others = [other for other in list(_ours) if other is not optimizer and other.is_attached and ids & _driven(other)]
    return max((o.param_groups[0]["first_index"] + sum(1 for _ in o.parameters) for o in others), default=0)


def samplers(model: nn.Module) -> list[IVON]:
    """The optimizers that hold a sample in parameters of the model."""
    ids = {id(p) for p in model.parameters()}
    return [optimizer for optimizer in list(_ours) if optimizer.is_sampled and ids & _driven(optimizer)]


def _driven(optimizer: IVON) -> set[int]:
    return {id(p) for p in optimizer.parameters} - optimizer.superseded


def _supersede(ids: set[int], by: torch.optim.Optimizer) -> None:
    for other in list(_ours):
        lost = set() if other is by or _wraps(by, other) else ids & _driven(other)
        if lost:
            other.sampling.restore()
            other.superseded |= lost


def _wraps(optimizer: torch.optim.Optimizer, ours: IVON) -> bool:
    """Whether it steps through one of ours: they have groups in common, or it keeps ours among its attributes."""
    groups = {id(group) for group in optimizer.param_groups}
    holds = any(value is ours for value in vars(optimizer).values())
    return holds or not groups.isdisjoint(map(id, ours.param_groups))


@functools.cache
def _watch_other_optimizers() -> None:
    register_optimizer_step_pre_hook(_before_step)


def _before_step(other: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """An optimizer of another kind that steps parameters of ours takes them over; a wrapper of ours does not.
    RuntimeError for ZeroRedundancyOptimizer, which leaves ours a part of the parameters."""
    if not _ours or other in _ours:
        return
    ids = {id(p) for group in other.param_groups for p in group["params"]}
    is_zero = type(other).__name__ == "ZeroRedundancyOptimizer"
    if is_zero and any(_wraps(other, ours) and ids - _driven(ours) for ours in list(_ours)):
        raise RuntimeError(SPREAD)
    _supersede(ids, other)
