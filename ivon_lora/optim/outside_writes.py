"""What others wrote where a sample should be: a sample can be drawn again from its key, and compared."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ivon_lora.functional.noise import NoiseKey
from ivon_lora.optim.parameters import GroupBatch
from ivon_lora.optim.sharding import local


def redraw(batch: GroupBatch, key: NoiseKey) -> list[Tensor]:
    """The sample of a batch again, in memory of its own."""
    dtypes = [part.dtype for part in batch.param]
    scratch = replace(
        batch,
        param=[mean.to(dtype, copy=True) for mean, dtype in zip(batch.mean, dtypes, strict=True)],
        mean=[mean.clone() for mean in batch.mean],
        copies=[],
    )
    batch.backend.sample([scratch], key)
    return scratch.param


def keep_changes(batch: GroupBatch, key: NoiseKey) -> bool:
    """Let what somebody wrote over a sample reach the mean, as the change that it was; whether there was something."""
    found = False
    for p, mean, sample in zip(batch.params, batch.mean, redraw(batch, key), strict=True):
        now = local(p).detach().to(sample.device)
        differs = now != sample.to(now.dtype)
        if bool(differs.any()):
            mean.add_(torch.where(differs, now.to(mean.dtype) - sample.to(mean.dtype), 0))
            found = True
    return found


def keep_untouched(batch: GroupBatch, key: NoiseKey) -> None:
    """After an interrupted draw: wherever the parameter is no sample of the mean beside it, it still is the mean."""
    for part, mean, sample in zip(batch.param, batch.mean, redraw(batch, key), strict=True):
        untouched = (part != sample) & (part != mean.to(part.dtype))
        mean.copy_(torch.where(untouched, part.to(mean.dtype), mean))


def restore_unless_written(p: Tensor, batch: GroupBatch, mean: Tensor, key: NoiseKey) -> None:
    """After loading: where a parameter is the sample of a mean, or that mean, it becomes the mean; else it stays."""
    (sample,) = redraw(replace(batch, mean=[mean]), key)
    part = local(p).detach()
    mine = (part == sample) | (mean.to(part.dtype) == part)
    part.copy_(torch.where(mine, mean.to(part.dtype), part))
    if p.dtype != mean.dtype:
        local(batch.states[0]["mean"]).copy_(torch.where(mine, mean, part.to(mean.dtype)))
