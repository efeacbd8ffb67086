"""Problems whose mean-field posterior is known: exact precision and mean in float64, and minibatch gradients.

Each parameter holds many replicas of one problem, which differ in their noise only: the average over replicas shows an
estimator's bias with a hundredth of the steps that a single run would need.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ivon_lora import IVON

FEATURES = 4


@dataclass
class Problem:
    """Mean-field optimum of lambda (E_q[L] + delta/2 E_q[theta^2]) - entropy, per coordinate, and gradients of L."""

    mean: np.ndarray  # (d,)
    curvature: np.ndarray  # (d,) E_q of the Hessian's diagonal: precision = lambda (curvature + delta)
    gradient: Callable[[Tensor], Tensor]  # theta (replicas, d) -> minibatch gradients, a fresh batch at each call


def quadratic(curvature: np.ndarray, centre: float, delta: float, batch_size: int, seed: int = 0) -> Problem:
    """L = sum h/2 (theta - c)^2, one example's gradient has variance h: a model that fits has Fisher = Hessian."""
    h = torch.from_numpy(curvature)
    rng = torch.Generator().manual_seed(seed)

    def gradient(theta: Tensor) -> Tensor:
        noise = torch.randn(theta.shape, generator=rng, dtype=torch.float64)
        return h * (theta.double() - centre) + (h / batch_size).sqrt() * noise

    return Problem(curvature * centre / (curvature + delta), curvature, gradient)


def logistic(ess: float, delta: float, batch_size: int, seed: int = 0, n: int = 1024) -> Problem:
    """Logistic regression on endless data: fixed inputs, labels drawn anew from the model for every batch.

    The optimum solves E_q[grad] + delta m = 0 and 1 / (lambda s^2) = E_q[Hessian diagonal] + delta, where under
    q = N(m, s^2) the logit of input x is N(x m, x^2 s^2): Gauss-Hermite in one dimension, Newton in m.
    """
    rng = np.random.default_rng(5)  # features are correlated, and of scales 0.5 to 2
    x = (rng.standard_normal((n, FEATURES)) + 0.5 * rng.standard_normal((n, 1))) * np.geomspace(0.5, 2, FEATURES)
    truth = np.array([1.0, -1.0, 0.5, 0.7]) * min(1.0, 1 / np.sqrt(ess * delta))
    p = 1 / (1 + np.exp(-x @ truth))
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    weights = weights / weights.sum()
    mean, variance = truth.copy(), np.full(FEATURES, 1 / ess)
    for _ in range(200):
        z = (x @ mean)[:, None] + np.sqrt((x**2) @ variance)[:, None] * nodes
        s = 1 / (1 + np.exp(-z))
        slope = (s * (1 - s)) @ weights
        curvature = (x**2).T @ slope / n
        force = x.T @ (s @ weights - p) / n + delta * mean
        mean = mean - np.linalg.solve((x * slope[:, None]).T @ x / n + delta * np.eye(FEATURES), force)
        variance = 1 / (ess * (curvature + delta))
    assert np.abs(force).max() < 1e-12  # it has converged
    xs, ps = torch.from_numpy(x), torch.from_numpy(p)
    generator = torch.Generator().manual_seed(seed)

    def gradient(theta: Tensor) -> Tensor:
        chosen = torch.randint(n, (theta.shape[0], batch_size), generator=generator)
        labels = (torch.rand(chosen.shape, generator=generator, dtype=torch.float64) < ps[chosen]).double()
        features = xs[chosen]
        error = torch.einsum("rbd,rd->rb", features, theta.double()).sigmoid() - labels
        return torch.einsum("rb,rbd->rd", error, features) / batch_size

    return Problem(mean, curvature, gradient)


def train(optimizer: IVON, p: nn.Parameter, problem: Problem, steps: int, n_samples: int = 1) -> None:
    """Steps with a learning rate that falls to zero: it ends at the mean, not somewhere near it."""
    (lr,) = (group["lr"] for group in optimizer.param_groups)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps) ** 2
        for _ in range(n_samples):
            with optimizer.sampled_params(train=True):
                p.grad = problem.gradient(p.detach()).to(p.dtype)
        optimizer.step()


def errors(optimizer: IVON, p: nn.Parameter, problem: Problem) -> tuple[float, np.ndarray]:
    """Average of replicas: distance from the exact mean relative to its length, and variance / exact - 1, (d,)."""
    group = optimizer.param_groups[0]
    exact = 1 / (group["ess"] * (problem.curvature + group["weight_decay"]))
    precision = (1 / optimizer.posterior(p).variance.double()).mean(0).numpy()
    mean = p.detach().double().mean(0).numpy()
    distance = float(np.linalg.norm(mean - problem.mean) / np.linalg.norm(problem.mean))
    return distance, 1 / precision / exact - 1
