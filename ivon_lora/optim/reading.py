"""The posterior of one parameter, read from its state."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Normal

from ivon_lora.functional._arrays import Array
from ivon_lora.functional.importance import CRITERIA, importance, spread
from ivon_lora.functional.ivon import posterior_std, root_precision


def normal(
    mean: Tensor, hess: Tensor, ess: float, weight_decay: Array, mask: tuple[Tensor, int] | None = None
) -> Normal:
    """``Normal(m, 1 / sqrt(ess (h + weight_decay)))``, a copy; zero where ``mask`` = (rank mask, dim) is False."""
    std = posterior_std(hess, ess, weight_decay)
    if mask is not None:
        std = std * spread(*mask, tuple(std.shape))
    # torch's own check refuses a standard deviation of 0, which is what a pruned rank has.
    return Normal(mean.to(std.dtype, copy=True), std, validate_args=False)


def importance_of(
    mean: Tensor, hess: Tensor, ess: float, weight_decay: Array, criterion: str, state: dict[str, Any]
) -> Tensor:
    """Importance of each element under ``criterion``; "sensitivity" needs its running means in ``state``.

    Raises:
        ValueError: an unknown criterion, or "sensitivity" without its running means.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}, got {criterion!r}")
    if criterion == "sensitivity":
        if "sensitivity" not in state:
            raise ValueError(
                '"sensitivity" needs running means of gradients: use RankPruner(criterion="sensitivity") and step'
            )
        return state["sensitivity"] * state["uncertainty"]
    mean = mean.to(hess.dtype)
    if hess.device.type == "cpu":  # numpy: no threads to wake for hundreds of small tensors, and an exact square root
        decay = weight_decay.numpy() if isinstance(weight_decay, Tensor) else weight_decay
        root = root_precision(hess.numpy(), ess, decay)
        return torch.from_numpy(np.array(importance(criterion, mean.numpy(), root), copy=None))
    return importance(criterion, mean, root_precision(hess, ess, weight_decay))
