"""A pair of A and B that begins anew in the middle of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def restart(optimizer: Optimizer, params: Iterable[Tensor]) -> None:
    """Let the optimizer forget what it knows of some parameters, as if they were new."""
    for p in params:
        optimizer.state.pop(p, None)
        p.grad = None


class WarmUp:
    """Lowers the learning rates for the first steps of a link, which a new Adam would take at full size.

    Args:
        optimizer: whose groups.
        steps: how many; step i has a share (i + 1) / (steps + 1) of its rate.
    """

    def __init__(self, optimizer: Optimizer, steps: int) -> None:
        self._optimizer, self._steps, self._rates = optimizer, steps, list[Any]()

    def begin(self, step: int) -> None:
        """In ``before_step`` of the ``step``-th step of a link, from 0."""
        self.end()  # the last step may have raised
        if step < self._steps:
            self._rates = [group["lr"] for group in self._optimizer.param_groups]
            for group in self._optimizer.param_groups:
                group["lr"] = group["lr"] * (step + 1) / (self._steps + 1)

    def end(self) -> None:
        """In ``after_step``: the scheduler finds its own rates."""
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=False):
            group["lr"] = rate
        self._rates = []


def uniform(normals: Tensor) -> Tensor:
    """PEFT's start of A (r, in, ...), kaiming_uniform_(a=sqrt 5), from standard normals."""
    return torch.erf(normals / math.sqrt(2)) / math.sqrt(normals[0].numel())
