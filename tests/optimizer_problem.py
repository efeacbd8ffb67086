"""Oracle of the optimizer's tests: a loss with known gradients, and IVON in float64 numpy, written from the paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ivon_lora import IVON
from ivon_lora.functional.noise import NoiseKey, normal

SHAPES: tuple[tuple[int, ...], ...] = ((3, 5), (7,), (), (2, 3, 4))


def make_params(
    shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]


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


def photo(optimizer: IVON) -> dict[str, Any]:
    """Everything a step may change, copied."""
    params = [p for g in optimizer.param_groups for p in g["params"]]
    return {
        "params": [p.detach().clone() for p in params],
        "state": [
            {k: v.clone() if isinstance(v, Tensor) else v for k, v in optimizer.state.get(p, {}).items()}
            for p in params
        ],
        "counters": (optimizer.completed_steps, optimizer.seed),
    }


def same_photo(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return (
        equal(first["params"], second["params"])
        and first["counters"] == second["counters"]
        and all(
            a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
            for a, b in zip(first["state"], second["state"], strict=True)
        )
    )


def assert_same_state(expected: IVON, found: IVON, *where: object) -> None:
    """Parameters and state of two optimizers are equal bit for bit, whatever device ``found`` is on.

    Args:
        where: shown when they are not, e.g. the step.
    """
    params = [[p for group in optimizer.param_groups for p in group["params"]] for optimizer in (expected, found)]
    for index, (p, q) in enumerate(zip(*params, strict=True)):
        assert torch.equal(p, q.to(p.device)), ("parameter", index, *where)
        state, other = expected.state[p], found.state[q]
        assert state.keys() == other.keys(), (index, *where)
        for name, value in state.items():
            assert torch.equal(value, other[name].to(value.device)), (name, index, *where)


@dataclass
class Oracle:
    """IVON of the paper's Algorithm 1 in float64; parameter ``i`` uses hyperparameters ``hyper[i]``."""

    mean: list[np.ndarray]
    hyper: list[dict[str, Any]]
    seed: int = 0
    completed: int = 0
    momentum: list[np.ndarray] = field(default_factory=list)
    hess: list[np.ndarray] = field(default_factory=list)
    updates: list[int] = field(default_factory=list)

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "hess_init": 1.0,
        "beta1": 0.9,
        "beta2": 0.99999,
        "weight_decay": 1e-4,
        "hess_approx": "price",
        "clip_radius": np.inf,
        "debias": True,
        "rescale_lr": True,
    }

    @classmethod
    def of(cls, params: Sequence[Tensor], hyper: dict[str, Any] | list[dict[str, Any]], seed: int = 0) -> Oracle:
        given = hyper if isinstance(hyper, list) else [hyper] * len(params)
        full = [{**cls.DEFAULTS, **h} for h in given]
        mean = [p.detach().double().numpy().copy() for p in params]
        return cls(
            mean=mean,
            hyper=full,
            seed=seed,
            momentum=[np.zeros_like(m) for m in mean],
            hess=[np.full_like(m, h["hess_init"]) for m, h in zip(mean, full, strict=True)],
            updates=[0] * len(mean),
        )

    def noise(self, i: int, sample: int = 0) -> np.ndarray:
        return normal(NoiseKey(self.seed, self.completed, sample), i, self.mean[i].shape, "cpu").double().numpy()

    def sigma(self, i: int) -> np.ndarray:
        h = self.hyper[i]
        return np.asarray(1.0 / np.sqrt(h["ess"] * (self.hess[i] + h["weight_decay"])))

    def theta(self, i: int, sample: int = 0) -> np.ndarray:
        return np.asarray(self.mean[i] + self.sigma(i) * self.noise(i, sample))

    def step(
        self, grads: Sequence[Sequence[np.ndarray | None]] | Sequence[list[np.ndarray]], sampled: bool = True
    ) -> None:
        """``grads[s][i]``: gradient of parameter ``i`` at sample ``s``; None for all samples: it is skipped."""
        for i, h in enumerate(self.hyper):
            given = [g[i] for g in grads]
            if all(g is None for g in given):
                continue
            per_sample = [np.zeros_like(self.mean[i]) if g is None else g for g in given]
            ghat = sum(per_sample) / len(per_sample)
            if sampled:
                delta, rho = h["weight_decay"], 1 - h["beta2"]
                if h["hess_approx"] == "price":
                    f = sum(g * self.noise(i, s) / self.sigma(i) for s, g in enumerate(per_sample)) / len(per_sample)
                else:
                    f = h["ess"] * sum(g**2 for g in per_sample) / len(per_sample)
                old = self.hess[i]
                new = h["beta2"] * old + rho * f + 0.5 * rho**2 * (old - f) ** 2 / (old + delta)
            else:
                new = self.hess[i]
            self.updates[i] += 1
            self.momentum[i] = h["beta1"] * self.momentum[i] + (1 - h["beta1"]) * ghat
            self.hess[i] = new
            debias = 1 - h["beta1"] ** self.updates[i] if h["debias"] else 1.0
            direction = (self.momentum[i] / debias + h["weight_decay"] * self.mean[i]) / (new + h["weight_decay"])
            lr = float(h["lr"]) * ((h["hess_init"] + h["weight_decay"]) if h["rescale_lr"] else 1.0)
            self.mean[i] = self.mean[i] - lr * np.clip(direction, -h["clip_radius"], h["clip_radius"])
        self.completed += 1

    def train_step(self, batch: int) -> None:
        """What `train_step` of this module does to the parameters."""
        self.step([[gradient(self.theta(i), i, batch) for i in range(len(self.mean))]])

    def check(self, optimizer: IVON, params: Sequence[Tensor], rtol: float = 1e-5) -> None:
        """Mean, momentum and Hessian of the optimizer equal the oracle's."""
        for i, p in enumerate(params):
            for found, expected in (
                (p, self.mean[i]),
                (optimizer.state[p]["momentum"], self.momentum[i]),
                (optimizer.state[p]["hess"], self.hess[i]),
            ):
                scale = float(np.max(np.abs(expected), initial=0.0))
                np.testing.assert_allclose(found.detach().double().numpy(), expected, rtol=rtol, atol=rtol * scale)
