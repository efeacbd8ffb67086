"""What a backend is given: the parameters of one call, role by role."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ivon_lora.functional.ivon import Hyper

#: roles that not every parameter has
SOME = ("rank_mask", "sensitivity", "uncertainty")


@dataclass
class Batch:
    """Parameters that share group, device, dtypes and number of updates, hence their scalars.

    A draw and the step that follows it share theirs. Every list has one tensor per parameter; all are contiguous, so
    element ``i`` of one is element ``i`` of the others. Of a sharded parameter they are the part in this process.

    Attributes:
        hyper: the scalars.
        indices: of the parameters in the optimizer, their identity for the noise.
        offsets: index, in the whole parameter (C order), of the first element.
        param: what the model computes with; fp32, bf16, fp16, or fp64 with a state in fp64.
        mean, momentum, hess: fp32 (fp64 for fp64 parameters). The mean of a draw is written, and read by the step.
            Where a step follows no draw, the mean of an fp32 parameter is the parameter itself.
        grad: gradients in a dtype that they share, for `bank` and `step`.
        banked_grad, banked_curvature: sums over the earlier samples of this step, of the state's dtype.
        rank_dims: dimension of size r; None for a parameter without ranks.
        rank_mask: bool ``(r,)``, False for ranks that neither move nor get noise; None where all do.
        sensitivity, uncertainty: running means of the criterion "sensitivity", which `step` keeps up; None for a
            parameter without.
    """

    hyper: Hyper
    indices: list[int]
    offsets: list[int]
    param: list[Tensor]
    mean: list[Tensor]
    momentum: list[Tensor]
    hess: list[Tensor]
    grad: list[Tensor] | None = None
    banked_grad: list[Tensor] | None = None
    banked_curvature: list[Tensor] | None = None
    rank_dims: list[int | None] | None = None
    rank_mask: list[Tensor | None] | None = None
    sensitivity: list[Tensor | None] | None = None
    uncertainty: list[Tensor | None] | None = None

    def __len__(self) -> int:
        return len(self.param)

    @property
    def device(self) -> torch.device:
        """Where all tensors are."""
        return self.hess[0].device

    def addresses(self, role: str) -> np.ndarray:
        """int64 ``(n,)``: where the tensors of a role begin; 0 for none."""
        tensors = getattr(self, role)
        if tensors is None:
            return np.zeros(len(self), np.int64)
        if role in SOME:
            return np.array([0 if t is None else t.data_ptr() for t in tensors], np.int64)
        return np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(tensors))

    @cached_property
    def numbers(self) -> np.ndarray:
        """int64 ``(5, n)``: elements, index, offset, r, and elements behind one index of the rank, of each parameter.

        Element ``i`` of the whole parameter belongs to rank ``(i // inner) % r``; both are 1 without ranks. Of a shard
        without a mask r is the number of its own ranks.
        """
        numbers = np.ones((5, len(self)), np.int64)
        numbers[:3] = list(map(Tensor.numel, self.hess)), self.indices, self.offsets
        for n, dim in enumerate(self.rank_dims or ()):
            if dim is not None:
                mask, shape = self.rank_mask[n] if self.rank_mask else None, self.param[n].shape
                numbers[3:, n] = shape[dim] if mask is None else len(mask), math.prod(shape[dim + 1 :])
        return numbers
