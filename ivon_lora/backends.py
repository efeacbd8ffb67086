"""Where the work of a step runs: what a backend is given, what it must do, and which one is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ivon_lora.noise import NoiseKey
from ivon_lora.reference import Hyper

BACKENDS = ("auto", "eager")


@dataclass
class Work:
    """One parameter's share of a step.

    Attributes:
        index: index of the parameter in the optimizer, its identity for the noise.
        param: the parameter, of any strides; receives the sample, or the new mean.
        mean: where the mean is read: the parameter itself, or a tensor of the state's dtype; contiguous.
        momentum, hess: state, contiguous, updated in place.
        grad: gradient, contiguous, or None where only a sample is drawn.
        mean_state: fp32 mean of a 16-bit parameter, receives the new mean too; else None.
        banked_grad, banked_curvature: sums over the earlier samples of this step, or None.
        rank_mask: bool (r,), False for ranks that neither move nor get noise, or None.
        rank_dim: the parameter's rank dimension when there is a mask.
    """

    index: int
    param: Tensor
    mean: Tensor
    momentum: Tensor
    hess: Tensor
    grad: Tensor | None = None
    mean_state: Tensor | None = None
    banked_grad: Tensor | None = None
    banked_curvature: Tensor | None = None
    rank_mask: Tensor | None = None
    rank_dim: int = 0


class Backend(Protocol):
    """Runs the equations of `reference` over many parameters that share their hyperparameters."""

    name: str

    def sample(self, works: Sequence[Work], hyper: Hyper, key: NoiseKey) -> None:
        """Write a posterior sample, mean + sigma eps(key), into every parameter."""
        ...

    def bank(self, works: Sequence[Work], hyper: Hyper, key: NoiseKey) -> None:
        """Add the gradient, and the curvature it implies, to the banked sums."""
        ...

    def step(self, works: Sequence[Work], hyper: Hyper, key: NoiseKey | None, n_samples: int) -> None:
        """Update momentum, Hessian and mean, and write the new mean into the parameter.

        Args:
            key: the sample at which ``grad`` was taken; None when there was none, then the Hessian stays.
            n_samples: samples of this step, the banked ones included; gradient and curvature are their means.
        """
        ...

    def nonfinite_elements(self) -> Tensor | int:
        """Gradient elements skipped so far because they, or the update they led to, were not finite."""
        ...


def choose_backend(requested: str) -> tuple[str, str]:
    """Name of the backend to use and the reason.

    Raises:
        ValueError: an unknown name, or one that cannot run here.
    """
    if requested not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {requested!r}")
    if requested == "auto":
        return "eager", "the only backend of this version"
    return requested, "asked for"


def make_backend(name: str, device: torch.device) -> Backend:
    """The backend ``name`` for parameters on ``device``."""
    from ivon_lora.eager import BlockedEager, TensorEager

    return BlockedEager() if device.type == "cpu" else TensorEager()
