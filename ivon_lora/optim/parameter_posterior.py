"""The posterior of one parameter, read from its state."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributions import Normal

from ivon_lora.backends.eager import EagerBackend
from ivon_lora.functional.importance import spread
from ivon_lora.functional.ivon import posterior_std
from ivon_lora.optim.param_groups import state_dtype
from ivon_lora.optim.parameters import GroupBatch
from ivon_lora.optim.sharding import like, mask_part

if TYPE_CHECKING:
    from ivon_lora.optim.ivon import IVON


def normal(optimizer: IVON, p: Tensor) -> Normal:
    """``Normal(m, 1 / sqrt(ess (h + weight_decay)))``, a copy; zero where a rank is pruned for good."""
    if _is_fixed(optimizer, p):
        value = p.detach().to(state_dtype(p), copy=True)
        return Normal(value, torch.zeros_like(value), validate_args=False)
    batch = _batch_of(optimizer, p)
    std = posterior_std(batch.hess[0], batch.hyper.ess, batch.hyper.weight_decay)
    if batch.rank_mask is not None and batch.rank_dims is not None:
        mask, dim = batch.rank_mask[0], batch.rank_dims[0]
        if mask is not None and dim is not None:
            std = std * spread(mask_part(p, mask, dim), dim, tuple(std.shape))
    mean = batch.mean[0].to(std.dtype, copy=True)
    # torch's own check refuses a standard deviation of 0, which is what a pruned rank has
    return Normal(like(p, mean), like(p, std), validate_args=False)


def importance_of(optimizer: IVON, p: Tensor, criterion: str) -> Tensor:
    """See `IVON.snr`."""
    if _is_fixed(optimizer, p):
        raise ValueError("the parameter is frozen and has never been updated: its value is certain, and has no SNR")
    batch = _batch_of(optimizer, p)
    if criterion == "sensitivity" and (batch.sensitivity is None or batch.sensitivity[0] is None):
        raise ValueError(
            '"sensitivity" needs running means of gradients: use RankPruner(criterion="sensitivity") and step'
        )
    return like(p, EagerBackend().importances(batch, 0, criterion))


def _is_fixed(optimizer: IVON, p: Tensor) -> bool:
    """Whether a parameter has always been frozen: nobody samples it, and reading makes no state for it."""
    optimizer.parameters.place(p)
    return not optimizer.parameters.has_posterior(p)


def _batch_of(optimizer: IVON, p: Tensor) -> GroupBatch:
    optimizer.sampling.settle()
    index, group = optimizer.parameters.place(p)
    return optimizer.parameters.batches([(index, group, p)], optimizer.sampling.hyper(prediction=True))[0]
