"""After training, the posterior is the exact mean-field one: for every curvature that claims it, and as wrong as said.

Tolerances: a mean over memory 1/rho of squares has relative noise sqrt(rho), over R replicas sqrt(rho / R); what
is left of the beginning after T steps is exp(-rho T); the biases are those of `reference`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ivon_lora import IVON
from tests.known_posteriors import Problem, errors, linear_gaussian, logistic, quadratic, train

REPLICAS = 160


def curved(ess: float, delta: float, batch_size: int) -> Problem:
    return quadratic(np.array([0.5, 1.0, 2.0]), 1.5 / np.sqrt(ess * delta), delta, batch_size)


def fitted(
    problem: Problem, ess: float, delta: float, steps: int, n_samples: int = 1, **options: Any
) -> tuple[IVON, nn.Parameter]:
    """Optimizer and parameter after training from 1.3 times the mean."""
    p = nn.Parameter((1.3 * torch.from_numpy(problem.mean)).float().repeat(REPLICAS, 1))
    optimizer = IVON([p], ess=ess, weight_decay=delta, **options)
    train(optimizer, p, problem, steps, n_samples)
    return optimizer, p


FISHER = {"hess_approx": "fisher", "step_rule": "adam", "lr": 0.02, "hess_init": "auto", "batch_size": 16}
#: rho ess / (2 B) = 0.01: the bias of staying positive
PRICE = {"hess_approx": "price", "lr": 0.05, "rescale_lr": False, "hess_init": 0.8, "beta2": 0.995}


@pytest.mark.parametrize(
    ("make", "ess", "delta", "n_samples"),
    [
        (linear_gaussian, 2000.0, 0.01, 1),
        (linear_gaussian, 1000.0, 0.004, 2),
        (logistic, 2000.0, 0.005, 1),
        (logistic, 4000.0, 0.001, 2),
        (curved, 2000.0, 0.01, 1),
        (curved, 10000.0, 0.05, 2),
    ],
)
def test_fisher_finds_the_posterior(
    make: Callable[[float, float, int], Problem], ess: float, delta: float, n_samples: int
) -> None:
    problem = make(ess, delta, 16)
    optimizer, p = fitted(problem, ess, delta, 600, n_samples, beta2=0.99, **FISHER)
    off, variance = errors(optimizer, p, problem)
    assert off < 0.02
    assert np.abs(variance).max() < 0.05  # (B - 1) / lambda = 1.5 % at most, noise 1 %, and the means' wander
    assert variance.max() < 0.03


@pytest.mark.parametrize(("make", "n_samples"), [(linear_gaussian, 1), (logistic, 1), (curved, 2)])
def test_price_finds_the_posterior_when_it_has_time(
    make: Callable[[float, float, int], Problem], n_samples: int
) -> None:
    problem = make(300.0, 0.02, 64)
    optimizer, p = fitted(problem, 300.0, 0.02, 1000, n_samples, **PRICE)
    off, variance = errors(optimizer, p, problem)
    assert off < 0.02
    assert np.abs(variance).max() < 0.05
