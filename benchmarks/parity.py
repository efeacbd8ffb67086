"""What must be right before any speed is worth printing: ivon-opt's trajectory. Budgets of ranks are for the tests."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from ivon_lora import IVON
from ivon_lora.functional.noise import NoiseKey, normal

#: largest difference to ivon-opt, relative to the largest element: some hundred roundings of fp32
TOLERANCE = 1e-5

_SHAPES = ((5, 7), (3,), (33, 2), (1,))
_STEPS = 20
_OPTIONS: tuple[dict[str, Any], ...] = (
    {"lr": 0.1, "ess": 1e3, "hess_init": 0.1, "beta2": 0.99, "weight_decay": 1e-2},
    {"lr": 0.1, "ess": 50.0, "beta2": 0.9, "hess_approx": "gradsq", "clip_radius": 0.1, "debias": False},
    {"lr": 0.01, "ess": 1e4, "hess_init": 0.01, "beta1": 0.0, "mc_samples": 3, "rescale_lr": False, "clip_radius": 0.5},
)


class ParityError(RuntimeError):
    """The optimizer about to be timed does not compute what it should."""


def check(backend: str) -> None:
    """Check one backend.

    Raises:
        ParityError: it differs from ivon-opt under the same noise.
    """
    for options in _OPTIONS:
        difference = difference_to_ivon_opt(backend, options)
        if not difference <= TOLERANCE:  # a NaN fails too
            raise ParityError(
                f"backend {backend!r} differs from ivon-opt by {difference:.2e} (relative, allowed {TOLERANCE:.0e}) "
                f"after at most {_STEPS} steps with the same noise and {options}"
            )


def difference_to_ivon_opt(backend: str, options: dict[str, Any]) -> float:
    """Largest relative difference of mean, momentum and Hessian over a whole trajectory with equal noise."""
    import ivon

    generator = torch.Generator().manual_seed(0)
    targets = [torch.randn(shape, generator=generator) for shape in _SHAPES]
    ours = [torch.randn(shape, generator=generator).requires_grad_() for shape in _SHAPES]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    optimizer = IVON(ours, backend=backend, seed=7, **options)
    oracle = ivon.IVON(theirs, **options)
    worst = 0.0
    for step in range(_STEPS):
        for sample in range(options.get("mc_samples", 1)):
            with optimizer.sampled_params(train=True):
                _backward(ours, targets)
            with _noise(NoiseKey(7, step, sample)), oracle.sampled_params(train=True):
                _backward(theirs, targets)
        optimizer.step()
        oracle.step()
        pairs = (
            (_flat(ours), _flat(theirs)),
            (_flat([optimizer.state[p]["momentum"] for p in ours]), oracle.param_groups[0]["momentum"]),
            (_flat([optimizer.state[p]["hess"] for p in ours]), oracle.param_groups[0]["hess"]),
        )
        for mine, expected in pairs:
            relative = ((mine - expected).abs().max() / expected.abs().max()).item()
            if not relative <= worst:  # keeps a NaN, which max() would drop
                worst = relative
    return worst


def _backward(params: list[Tensor], targets: list[Tensor]) -> None:
    """Gradient of a mildly non-quadratic loss, so that gradients and curvatures differ from element to element."""
    for p in params:
        p.grad = None
    loss = torch.stack(
        [((p - t) ** 2 * (1 + t * t)).sum() / 2 + (p**4).sum() / 100 for p, t in zip(params, targets, strict=True)]
    )
    (loss.sum() / 10).backward()


def _noise(key: NoiseKey) -> Any:
    """ivon-opt draws all elements of a group with one torch.randn: give it the normals of our key instead."""
    drawn = _flat([normal(key, i, torch.Size(shape), "cpu") for i, shape in enumerate(_SHAPES)])
    return patch.object(torch, "randn", lambda *_, **__: drawn)


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])
