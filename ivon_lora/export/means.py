"""What the optimizer knows about a parameter: its posterior mean and the mask of its ranks, never a sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ivon_lora.optim.sharding import whole


class Means:
    """Read-only view of an optimizer (or of none) by parameter.

    Args:
        optimizer: an `IVON`, possibly wrapped by Accelerate; any other optimizer, or None, holds no samples, so there
            the parameter itself is the mean.
    """

    def __init__(self, optimizer: Any | None) -> None:
        while optimizer is not None and not hasattr(optimizer, "posterior") and hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        self.optimizer = optimizer
        groups = [] if optimizer is None else optimizer.param_groups
        self._known = {id(p) for group in groups for p in group["params"]}

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of ``tensor`` in its own dtype and shape, detached; also while a sample is live.

        Of a sharded tensor the whole, for which all processes must ask.
        """
        if id(tensor) in self._known and hasattr(self.optimizer, "posterior"):
            mean: Tensor = self.optimizer.posterior(tensor).mean  # type: ignore[union-attr]
            return whole(mean.detach().to(tensor.dtype))
        return whole(tensor.detach())

    def mask(self, *tensors: Tensor | None) -> Tensor | None:
        """The rank mask (rank,) that the pruner wrote beside the first of ``tensors`` that has one."""
        for tensor in tensors:
            if tensor is None or id(tensor) not in self._known or tensor not in self.optimizer.state:  # type: ignore[union-attr]
                continue
            mask = self.optimizer.state[tensor].get("rank_mask")  # type: ignore[union-attr]
            if mask is not None:
                return torch.as_tensor(mask).detach().to("cpu", torch.bool)
        return None
