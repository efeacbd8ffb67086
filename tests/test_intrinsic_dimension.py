"""TwoNN against manifolds of known dimension, an independent float64 oracle and scikit-dimension's recipe."""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from ivon_lora import intrinsic_dimension
from ivon_lora.variants import intrinsic_dimension as twonn

N = 5000
METHODS = ("mle", "regression")


def sphere(n: int, d: int) -> Tensor:
    """S^d in d + 1 dimensions."""
    points = torch.randn(n, d + 1, dtype=torch.float64)
    return points / points.norm(dim=1, keepdim=True)


def gaussian(n: int, d: int) -> Tensor:
    """In as many dimensions as it has."""
    return torch.randn(n, d, dtype=torch.float64)


def linear(n: int, d: int) -> Tensor:
    """A d-dimensional affine subspace of 50 dimensions, off the origin."""
    return gaussian(n, d) @ gaussian(d, 50) + 100


def swiss_roll(n: int, d: int = 2) -> Tensor:
    angle = 1.5 * torch.pi * (1 + 2 * torch.rand(n, dtype=torch.float64))
    return torch.stack([angle * angle.cos(), 21 * torch.rand(n, dtype=torch.float64), angle * angle.sin()], 1)


MANIFOLDS = [(sphere, 1), (sphere, 4), (gaussian, 8), (linear, 2), (linear, 8), (swiss_roll, 2), (sphere, 20)]


def oracle(x: np.ndarray, method: str, trim: float) -> float:
    """Facco et al. 2017 with a k-d tree and scikit-dimension's recipe: F = i / n, unbiased censored likelihood."""
    distances, _ = cKDTree(x).query(x, 3)
    log_mu = np.sort(np.log(distances[:, 2] / distances[:, 1]))
    n, kept = len(log_mu), int(len(log_mu) * (1 - trim))
    if method == "mle":
        return (kept - 1) / (log_mu[:kept].sum() + (n - kept) * log_mu[kept - 1])
    heights = -np.log1p(-np.arange(1, kept + 1) / n)
    return float(heights @ log_mu[:kept] / (log_mu[:kept] @ log_mu[:kept]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("make", "d"), MANIFOLDS)
def test_known_dimensions_within_5_percent_and_a_thousandth_of_the_oracle(make, d, method) -> None:
    n = N if d < 10 else 2000
    x = make(n, d)
    found = intrinsic_dimension(x, method)
    assert found.estimate == pytest.approx(d, rel=0.05 if d < 10 else 0.25)
    assert found.low < d < found.high
    assert (found.n_points, found.n_duplicates, found.method) == (n, 0, method)
    for trim, other in ((0.1, found), (0.3, intrinsic_dimension(x, method, 0.3))):
        assert other.estimate == pytest.approx(oracle(x.numpy(), method, trim), rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_within_1_percent_of_scikit_dimension(method) -> None:
    skdim = pytest.importorskip("skdim", reason="needs scikit-dimension")
    x = gaussian(1000, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numba's and sklearn's own
        theirs = skdim.id.TwoNN(method={"mle": "mle", "regression": "linear"}[method]).fit(x.numpy()).dimension_
    assert intrinsic_dimension(x, method).estimate == pytest.approx(theirs, rel=0.01)


def test_without_trimming_the_likelihood_is_n_over_the_sum_of_logarithms() -> None:
    x = gaussian(500, 3)
    expected = oracle(x.numpy(), "mle", 0) * 500 / 499  # which is unbiased
    assert float(intrinsic_dimension(x, trim=0)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("method", "trim"), [("mle", 0.0), ("mle", 0.2), ("regression", 0.0), ("regression", 0.1)])
def test_the_interval_covers_the_estimates_of_flat_surfaces(method, trim) -> None:
    """95 % nominal; 100 samples without edge (a flat torus in four dimensions): 2.2 % is one standard deviation."""
    covered = 0
    for _ in range(100):
        angles = 2 * torch.pi * torch.rand(250, 2, dtype=torch.float64)
        found = intrinsic_dimension(torch.cat([angles.cos(), angles.sin()], 1), method, trim)
        covered += found.low <= 2 <= found.high
    assert 85 <= covered < 100


@pytest.mark.parametrize(("n", "d"), [(500, 20), (4000, 2), (4000, 8)])
def test_the_bias_in_a_cube_is_as_documented(n, d) -> None:
    estimates = [intrinsic_dimension(torch.rand(n, d)).estimate for _ in range(4000 // n)]
    assert sum(estimates) / len(estimates) / d == pytest.approx(twonn._cube_shrink(d, n), abs=0.05)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_result_does_not_depend_on_blocks_or_order(dtype, method, monkeypatch) -> None:
    x = linear(700, 3).to(dtype)
    expected = intrinsic_dimension(x, method)
    for points in (1, 7, 64, 699, 700, 10_000):
        monkeypatch.setattr(twonn, "BLOCK_ELEMENTS", points * 700)
        assert intrinsic_dimension(x, method) == expected
    with torch.autocast("cpu", torch.bfloat16):
        assert intrinsic_dimension(x[torch.randperm(700)].requires_grad_(), method) == expected


@pytest.mark.parametrize("shift", [0.0, 1e3])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_shifts_and_scales_lose_nothing(shift, scale) -> None:
    x = ((linear(1500, 2) + shift) * scale).float()
    found = intrinsic_dimension(x)
    assert found.estimate == pytest.approx(oracle(x.double().numpy() / scale, "mle", 0.1), rel=1e-3)
    for power in (2.0**900, 2.0**-900):
        assert intrinsic_dimension(x.double() * power) == found
    assert intrinsic_dimension(x.double() / x.abs().max() * 1.7e308).estimate > 0  # differences overflow


def test_neighbours_closer_than_double_precision_products_can_see() -> None:
    centres = 1e6 * gaussian(20, 3)
    x = (centres.repeat_interleave(20, 0) + 1e-4 * gaussian(400, 3)).double()
    assert intrinsic_dimension(x).estimate == pytest.approx(oracle(x.numpy(), "mle", 0.1), rel=5e-3)


def test_duplicates_are_counted_once() -> None:
    x = gaussian(400, 3)
    once = intrinsic_dimension(x)
    many = intrinsic_dimension(torch.cat([x, x[:50], x[:1].expand(200, 3)]))
    assert (many.n_points, many.n_duplicates) == (400, 250)
    assert (many.estimate, many.low, many.high) == (once.estimate, once.low, once.high)
    signed = torch.tensor([[0.0, 1.0], [-0.0, 1.0], [1.0, 1.0], [3.0, 1.0], [7.0, 1.0]])
    assert intrinsic_dimension(signed).n_duplicates == 1


@pytest.mark.parametrize(
    ("x", "named", "message"),
    [
        (torch.zeros(5), {}, r"shape \(5,\): give points as \(n, features\)"),
        (torch.zeros(5, 2, dtype=torch.int64), {}, "dtype torch.int64: give floating-point values"),
        (torch.tensor([[0.0], [math.nan], [2.0], [math.inf]]), {}, "in 2 of 4 points, first in point 1"),
        (torch.zeros(0, 2), {}, "0 distinct points of 0: give 3 or more"),
        (torch.tensor([[0.0], [1.0], [1.0], [0.0]]), {}, "2 distinct points of 4: give 3 or more"),
        (torch.cartesian_prod(torch.arange(9.0), torch.arange(9.0)), {}, "81 of 81 points are equally far away"),
        (torch.rand(9, 2), {"method": "ml"}, "method='ml' is unknown: choose 'mle' or 'regression'"),
        (torch.rand(9, 2), {"trim": 1.0}, r"trim=1.0 is outside \[0, 1\)"),
        (torch.rand(9, 2), {"confidence": 1.0}, r"confidence=1.0 is outside \(0, 1\)"),
    ],
)
def test_input_that_cannot_be_used(x, named, message) -> None:
    with pytest.raises(ValueError, match=message):
        intrinsic_dimension(x, **named)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    x = linear(4000, 5).float()
    found = intrinsic_dimension(x.cuda())
    assert found.estimate == pytest.approx(intrinsic_dimension(x).estimate, rel=1e-9)
    assert intrinsic_dimension(x.cuda()).estimate == pytest.approx(found.estimate, rel=1e-12)
