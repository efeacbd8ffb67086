"""What must be right before any speed is worth printing: small problems whose answer is known."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ivon_lora import IVON, LoraAdapter, RankPruner
from ivon_lora.functional.noise import NoiseKey, normal

#: largest difference to ivon-opt, relative to the largest element: some hundred roundings of fp32
TOLERANCE = 1e-5

_SHAPES = ((5, 7), (3,), (33, 2), (1,))
_STEPS = 20
_OPTIONS: tuple[dict[str, Any], ...] = (
    {"lr": 0.1, "ess": 1e3, "hess_init": 0.1, "beta2": 0.99, "weight_decay": 1e-2},
    {
        "lr": 0.1,
        "ess": 50.0,
        "hess_init": 1.0,
        "beta2": 0.9,
        "hess_approx": "gradsq",
        "clip_radius": 0.1,
        "debias": False,
    },
    {"lr": 0.01, "ess": 1e4, "hess_init": 0.01, "beta1": 0.0, "mc_samples": 3, "rescale_lr": False, "clip_radius": 0.5},
)


class GateError(RuntimeError):
    """The optimizer about to be timed does not compute what it should."""


def check(backend: str) -> None:
    """Check one backend.

    Raises:
        GateError: it differs from ivon-opt under the same noise, or a pruner does not keep its budget.
    """
    for options in _OPTIONS:
        difference = difference_to_ivon_opt(backend, options)
        if not difference <= TOLERANCE:  # a NaN fails too
            raise GateError(
                f"backend {backend!r} differs from ivon-opt by {difference:.2e} (relative, allowed {TOLERANCE:.0e}) "
                f"after at most {_STEPS} steps with the same noise and {options}"
            )
    _check_budget(backend)


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
            with _noise(NoiseKey(7, step, sample)):
                context = oracle.sampled_params(train=True)
                context.__enter__()
            _backward(theirs, targets)
            context.__exit__(None, None, None)
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


@contextmanager
def _noise(key: NoiseKey) -> Iterator[None]:
    """ivon-opt draws all elements of a group with one torch.randn: give it the normals of our key instead."""
    original = torch.randn

    def keyed(*size: Any, **_: Any) -> Tensor:
        return _flat([normal(key, i, torch.Size(shape), "cpu") for i, shape in enumerate(_SHAPES)])

    torch.randn = keyed
    try:
        yield
    finally:
        torch.randn = original


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def _check_budget(backend: str) -> None:
    """After every allocation exactly as many ranks live as the budget says, and pruned ranks are zero at the end."""
    generator = torch.Generator().manual_seed(0)

    def parameter(*shape: int) -> Tensor:
        p = torch.randn(shape, generator=generator).requires_grad_()
        p.grad = torch.randn(shape, generator=generator)
        return p

    adapters = [LoraAdapter(f"layer{i}", parameter(6, 9), parameter(11, 6)) for i in range(3)]
    pruner = RankPruner(adapters, 2, total_steps=12, warmup=1, final=3, interval=2)
    params = [tensor for adapter in adapters for _, tensor, _ in adapter.tensors()]
    optimizer = IVON(params, lr=0.1, ess=100.0, backend=backend, pruner=pruner)
    for step in range(1, 13):
        optimizer.train()
        optimizer.step()
        live = sum(int(optimizer.state[adapter.A]["rank_mask"].sum()) for adapter in adapters)
        if pruner.is_due(step) and live != pruner.budget(step):
            raise GateError(
                f"backend {backend!r} keeps {live} ranks at step {step}, but the budget is {pruner.budget(step)}"
            )
    for adapter in adapters:
        if adapter.B.detach()[:, ~optimizer.state[adapter.B]["rank_mask"]].any():
            raise GateError(f"backend {backend!r} leaves pruned ranks of {adapter.name} that are not zero")
