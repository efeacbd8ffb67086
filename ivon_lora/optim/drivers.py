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
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from ivon_lora.optim.ivon import IVON

_drivers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_known_strangers: weakref.WeakKeyDictionary[torch.optim.Optimizer, int] = weakref.WeakKeyDictionary()


def take_over(optimizer: IVON, params: Iterable[Tensor]) -> None:
    """From now on ``optimizer`` drives these parameters; their drivers before give the mean back."""
    _watch_other_optimizers()
    for p in params:
        found = _drivers.get(p)
        before = None if found is None else found()
        if before is not None and before is not optimizer:
            before.sampling.restore()
            before.superseded.add(id(p))
        optimizer.superseded.discard(id(p))
        _drivers[p] = weakref.ref(optimizer)


@functools.cache
def _watch_other_optimizers() -> None:
    register_optimizer_step_pre_hook(_before_step)


def _before_step(stranger: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """An optimizer of another kind that steps parameters of ours takes them over; a wrapper of ours does not."""
    if hasattr(stranger, "superseded"):  # one of ours
        return
    params = [p for group in stranger.param_groups for p in group["params"]]
    if _known_strangers.get(stranger) == len(params):
        return
    _known_strangers[stranger] = len(params)
    groups = {id(group) for group in stranger.param_groups}
    for p in params:
        found = _drivers.get(p)
        before = None if found is None else found()
        if before is None or any(id(group) in groups for group in before.param_groups):
            continue
        before.sampling.restore()
        before.superseded.add(id(p))
        del _drivers[p]
