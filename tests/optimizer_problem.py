"""A loss with known gradients, what an optimizer may change, and `Oracle`: what it should be."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ivon_lora import IVON
from ivon_lora.functional.noise import NoiseKey, normal
from tests.float64_oracle import Ivon64

SHAPES: tuple[tuple[int, ...], ...] = ((3, 5), (7,), (), (2, 3, 4))
HYPER: dict[str, Any] = {"lr": 0.1, "ess": 50.0, "beta2": 0.99, "weight_decay": 0.01}


def make_params(
    shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu"
) -> list[nn.Parameter]:
    """The same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype)) for s in shapes]


def new(params: Sequence[Tensor], **more: Any) -> IVON:
    return IVON(params, **{**HYPER, **more})


def target(i: int, shape: Sequence[int], batch: int) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(1000 * batch + i), dtype=torch.float64)


def quadratic(params: Sequence[Tensor], batch: int = 0) -> Tensor:
    """Sum of 0.5 (1 + i)(p_i - target)^2, with targets that differ from batch to batch."""
    terms = [0.5 * (1 + i) * (p.double() - target(i, p.shape, batch)).square().sum() for i, p in enumerate(params)]
    return torch.stack(terms).sum()


def gradient(theta: np.ndarray, i: int, batch: int = 0) -> np.ndarray:
    """Gradient of `quadratic` for parameter ``i``, in closed form."""
    return np.asarray((1 + i) * (theta - target(i, theta.shape, batch).numpy()))


def train_step(optimizer: IVON, params: Sequence[Tensor], batch: int) -> float:
    """The loop body of a Trainer: train, forward, backward, step."""
    optimizer.train()
    optimizer.zero_grad()
    loss = quadratic(params, batch)
    loss.backward()
    optimizer.step()
    return loss.item()


def run(optimizer: IVON, params: Sequence[Tensor], batches: Sequence[int]) -> list[float]:
    return [train_step(optimizer, params, b) for b in batches]


def values(params: Sequence[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Bit for bit (but 0 = -0)."""
    return len(first) == len(second) and all(
        torch.equal(a.detach(), b.detach()) for a, b in zip(first, second, strict=True)
    )


def photo(optimizer: IVON) -> dict[str, Tensor]:
    """Everything a step may change, copied, by name or number of the parameter; a collective where it is sharded."""
    found = {"counters": torch.tensor([optimizer.completed_steps, optimizer.seed])}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    names = [name for group in optimizer.param_groups for name in group.get("param_names", [])]
    for name, p in zip(names or map(str, range(len(params))), params, strict=True):
        for key, value in {"": p, **optimizer.state.get(p, {})}.items():
            whole = value.full_tensor() if hasattr(value, "full_tensor") else torch.as_tensor(value)
            found[f"{name.removeprefix('module.')}/{key}"] = whole.detach().cpu().clone()
    return found


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    """Names under which two photos do not hold the same bits (but 0 = -0)."""
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


class Oracle:
    """`Ivon64` for every parameter, with the noise of the optimizer."""

    def __init__(self, params: Sequence[Tensor], hyper: dict[str, Any] | list[dict[str, Any]], seed: int = 0) -> None:
        given = hyper if isinstance(hyper, list) else [hyper] * len(params)
        self.each = [Ivon64(p.detach().double().numpy(), **h) for p, h in zip(params, given, strict=True)]
        self.seed, self.completed = seed, 0

    def noise(self, i: int, sample: int = 0) -> np.ndarray:
        key = NoiseKey(self.seed, self.completed, sample)
        return normal(key, i, self.each[i].mean.shape, "cpu").double().numpy()

    def theta(self, i: int, sample: int = 0) -> np.ndarray:
        return self.each[i].sample(self.noise(i, sample))

    def step(
        self, grads: Sequence[Sequence[np.ndarray | None]] | Sequence[list[np.ndarray]], sampled: bool = True
    ) -> None:
        """``grads[s][i]``: gradient of parameter ``i`` at sample ``s``; None for all samples: it is skipped."""
        for i, oracle in enumerate(self.each):
            given = [g[i] for g in grads]
            if any(g is not None for g in given):
                epses = [self.noise(i, s) for s in range(len(given))] if sampled else None
                oracle.step([np.zeros_like(oracle.mean) if g is None else g for g in given], epses)
        self.completed += 1

    def train_step(self, batch: int) -> None:
        """What `train_step` of this module does to the parameters."""
        self.step([[gradient(self.theta(i), i, batch) for i in range(len(self.each))]])

    def check(self, optimizer: IVON, params: Sequence[Tensor], rtol: float = 1e-5) -> None:
        """Mean, momentum and Hessian of the optimizer equal the oracle's."""
        for p, oracle in zip(params, self.each, strict=True):
            for found, expected in (
                (p, oracle.mean),
                (optimizer.state[p]["momentum"], oracle.momentum),
                (optimizer.state[p]["hess"], oracle.hess),
            ):
                scale = float(np.max(np.abs(expected), initial=0.0))
                np.testing.assert_allclose(found.detach().double().numpy(), expected, rtol=rtol, atol=rtol * scale)
