"""After training, the posterior is the exact mean-field one: for every curvature that claims it, and as wrong as said.

Tolerances: a mean over memory 1/rho of squares has relative noise sqrt(rho), over R replicas sqrt(rho / R); what
is left of the beginning after T steps is exp(-rho T); the biases are those of `reference`.
"""

from collections.abc import Callable
from typing import Any

import ivon
import numpy as np
import pytest
import torch
from torch import nn

from ivon_lora import IVON, VAdam
from tests.known_posteriors import Problem, errors, logistic, quadratic, train

REPLICAS = 160


def curved(ess: float, delta: float, batch_size: int) -> Problem:
    return quadratic(np.array([0.5, 1.0, 2.0]), 1.5 / np.sqrt(ess * delta), delta, batch_size)


def make_optimizer(p: nn.Parameter, ess: float, delta: float, **options: Any) -> IVON:
    """IVON, or with ``betas`` VAdam at temperature 1 with a prior that stays, and its noise from the start."""
    if "betas" not in options:
        return IVON([p], ess=ess, weight_decay=delta, **options)
    fixed: dict[str, Any] = {"temperature": 1.0, "prior_std": (ess * delta) ** -0.5, "noise_warmup": 0}
    return VAdam([p], num_examples=int(ess), **fixed, **options)


VADAM: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.99), "batch_size": 16}
#: rho ess / (2 B) = 0.01: the bias of staying positive
PRICE: dict[str, Any] = {"hess_approx": "price", "lr": 0.05, "rescale_lr": False, "beta2": 0.995}


@pytest.mark.parametrize(
    ("make", "ess", "delta", "batch_size", "n_samples", "steps", "options"),
    [
        (logistic, 2000.0, 0.005, 16, 1, 600, VADAM),
        (logistic, 1000.0, 0.004, 16, 2, 600, VADAM),
        (curved, 2000.0, 0.01, 16, 1, 600, VADAM),
        (curved, 1000.0, 0.004, 16, 2, 600, VADAM),
        (logistic, 300.0, 0.02, 64, 1, 1000, {**PRICE, "hess_init": 0.2}),
        (curved, 300.0, 0.02, 64, 1, 1000, {**PRICE, "hess_init": 0.8}),
        (curved, 300.0, 0.02, 64, 2, 1000, {**PRICE, "hess_init": 0.8}),
    ],
)
def test_it_is_found_from_beside_the_mean(
    make: Callable[[float, float, int], Problem],
    ess: float,
    delta: float,
    batch_size: int,
    n_samples: int,
    steps: int,
    options: dict[str, Any],
) -> None:
    problem = make(ess, delta, batch_size)
    p = nn.Parameter((1.3 * torch.from_numpy(problem.mean)).float().repeat(REPLICAS, 1))
    optimizer = make_optimizer(p, ess, delta, **options)
    train(optimizer, p, problem, steps, n_samples)
    off, variance = errors(optimizer, p, problem)
    assert off < 0.02
    assert np.abs(variance).max() < 0.05  # VAdam: (B - 1) / lambda = 1.5 % at most, noise 1 %, and the means' wander
    assert variance.max() < 0.03 or options is not VADAM


def at_the_mean(
    problem: Problem, ess: float, delta: float, steps: int, replicas: int = 2 * REPLICAS, **options: Any
) -> np.ndarray:
    """Hessians (replicas, d) after steps that leave the mean where it should be."""
    p = nn.Parameter(torch.from_numpy(problem.mean).float().repeat(replicas, 1))
    optimizer = make_optimizer(p, ess, delta, lr=0.0, **options)
    train(optimizer, p, problem, steps)
    return np.asarray(optimizer.state[p]["hess"].double().numpy())


@pytest.mark.parametrize("rho", [0.1, 0.01])
def test_noise_of_fisher_is_the_root_of_rho(rho: float) -> None:
    problem = curved(1e5, 0.01, 16)
    hess = at_the_mean(problem, 1e5, 0.01, int(6 / rho), batch_size=16, betas=(0.9, 1 - rho))
    np.testing.assert_allclose(hess.mean(0), problem.curvature, rtol=4 * np.sqrt(rho / len(hess)))
    expected = np.sqrt(2 * rho / (2 - rho))  # of a mean with weights rho (1 - rho)^k of squares, each sqrt(2)
    np.testing.assert_allclose(hess.std(0) / hess.mean(0), expected, rtol=0.2)


def test_bias_of_fisher_is_the_squared_mean_gradient_at_the_samples() -> None:
    """h = H + (B - 1) H^2 sigma^2 with sigma^2 = 1 / (lambda h): 37 % where B = lambda / 2, nothing for B << lambda."""
    for ess, batch_size, ratio in ((100.0, 51, (1 + np.sqrt(3)) / 2), (20_000.0, 51, 1.0025)):
        problem = quadratic(np.array([0.5, 1.0, 2.0]), 0.0, 1e-6, batch_size)
        hess = at_the_mean(problem, ess, 1e-6, 300, batch_size=batch_size, betas=(0.9, 0.97))
        np.testing.assert_allclose(hess.mean(0) / problem.curvature, ratio, rtol=0.03)


@pytest.mark.parametrize(("ess", "rho"), [(1000.0, 0.02), (4000.0, 0.02), (200.0, 0.01)])
def test_price_settles_above_the_curvature_by_what_staying_positive_costs(ess: float, rho: float) -> None:
    """h = H (1 + rho lambda / (2 B)), and terms of the order of rho."""
    problem = quadratic(np.array([0.5, 1.0, 2.0]), 0.0, 1e-6, 20)
    hess = at_the_mean(problem, ess, 1e-6, int(6 / rho), replicas=2000, hess_init=1.0, beta2=1 - rho)
    assert (hess / problem.curvature).mean() == pytest.approx(1 + rho * ess / 40, rel=0.06)


def test_gradsq_is_too_narrow_by_examples_over_batch_size_here_and_in_ivon_opt() -> None:
    """At temperature 1, lambda is the number of examples N; the variance should be 1 / (N H) and is B / N of that."""
    n, batch_size, rho = 2000.0, 20, 0.02
    problem = quadratic(np.array([0.5, 1.0, 2.0]), 0.0, 1e-6, batch_size)
    ours = at_the_mean(problem, n, 1e-6, 300, hess_approx="gradsq", hess_init=100.0, beta2=1 - rho)
    p = nn.Parameter(torch.zeros(2 * REPLICAS, 3))
    peer = ivon.IVON([p], lr=1e-12, ess=n, weight_decay=1e-6, hess_approx="gradsq", hess_init=100.0, beta2=1 - rho)
    torch.manual_seed(0)
    for _ in range(300):
        with peer.sampled_params(train=True):
            p.grad = problem.gradient(p.detach()).to(p.dtype)
        peer.step()
    theirs = peer.param_groups[0]["hess"].double().numpy().reshape(-1, 3)
    for hess in (ours, theirs):
        np.testing.assert_allclose(hess.mean(0) / problem.curvature, n / batch_size, rtol=0.06)
