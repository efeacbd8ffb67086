"""The equations: against the published form in float64, and the properties that hold for any input."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from ivon_lora.functional import ivon as functional
from ivon_lora.functional.ivon import Hyper
from tests.float64_oracle import Ivon64

IVON = Hyper(
    ess=200.0, weight_decay=0.05, lr=0.3, beta1=0.8, rho=0.1, clip_radius=1.5, debias=1 - 0.8**3, curvature="price"
)
VADAM = dataclasses.replace(IVON, curvature="fisher", square_scale=48.0, inverse_batch=1 / 48, prior_weight=0.4)


@pytest.mark.parametrize(
    "hyper", [IVON, dataclasses.replace(IVON, curvature="gradsq", square_scale=200.0), VADAM], ids=lambda h: h.curvature
)
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_one_step_equals_the_published_form_in_float64(kind, hyper):
    rng = np.random.default_rng(1)
    mean, momentum, grad, eps = rng.standard_normal((4, 1000))
    hess = rng.uniform(0.01, 3, 1000)
    hess[:10] = 0.0 if hyper.curvature == "fisher" else hess[:10]
    oracle = Ivon64(mean, lr=0.3, ess=200, beta1=0.8, beta2=0.9, weight_decay=0.05, clip_radius=1.5, rescale_lr=False)
    oracle.hess_approx, oracle.batch_size, oracle.prior_weight = hyper.curvature, 48, hyper.prior_weight
    oracle.momentum, oracle.hess, oracle.t = momentum.copy(), hess.copy(), 2
    oracle.step([grad], [eps])
    args = [kind(a) for a in (mean, momentum, hess, grad, eps)]
    curvature = functional.estimate_curvature(args[3], args[2], args[4], hyper)
    m, g, h, finite = functional.ivon_step(*args[:4], curvature, hyper, None)
    assert finite.all()
    for got, want in ((m, oracle.mean), (g, oracle.momentum), (h, oracle.hess)):
        # the two forms of the Hessian line round differently: a few ulps of the largest summand
        np.testing.assert_allclose(np.asarray(got), want, rtol=1e-12, atol=1e-12 * np.abs(want).max())


@pytest.mark.parametrize("hyper", [IVON, VADAM], ids=lambda h: h.curvature)
def test_numpy_and_torch_give_the_same_bits_in_fp32(hyper):
    rng = np.random.default_rng(2)
    arrays = [*rng.standard_normal((4, 4096)).astype(np.float32), rng.uniform(1e-4, 3, 4096).astype(np.float32)]
    arrays.append(rng.random(4096) < 0.9)
    found = []
    for kind in (np.asarray, torch.from_numpy):
        mean, momentum, grad, eps, hess, active = map(kind, arrays)
        curvature = functional.estimate_curvature(grad, hess, eps, hyper)
        step = functional.ivon_step(mean, momentum, hess, grad, curvature, hyper, active)
        sample = functional.draw_sample(mean, hess, eps, 200.0, 0.05)
        found.append([np.asarray(x) for x in (*step, sample, functional.posterior_std(hess, 200.0, 0.05))])
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("rho", [1.0, 1 / 3, 1e-3])
def test_the_running_mean_of_squares_never_turns_negative(rho):
    rng = np.random.default_rng(8)
    hess = np.full(4096, 3.0, np.float32)
    hyper = dataclasses.replace(VADAM, rho=rho)
    with np.errstate(all="ignore"):
        for scale in (1.0, 1e-12, 1e-22, 1e18, 1e25, 1e-30, 0.0):
            grad = (rng.standard_normal(4096) * scale).astype(np.float32)
            hess = functional.update_hessian(hess, functional.estimate_curvature(grad, hess, None, hyper), hyper)
            assert (hess >= 0).all()
            assert np.isfinite(hess).all()


def test_vadams_step_forgets_the_unit_of_the_batch_and_bounds_the_priors_pull():
    """h = B v: the same step for every B. A gradient of zero: the mean shrinks by lr, whatever the prior."""
    mean, momentum, second = np.array([1.0, -2.0, 3.0]), np.array([1e-3, 2.0, 0.0]), np.array([1e-6, 1.0, 0.0])
    free = dataclasses.replace(VADAM, debias=1.0, clip_radius=math.inf, prior_weight=1.0)
    for decay in (1e-7, 1e-4):
        steps = []
        for batch in (1.0, 640.0):
            hyper = dataclasses.replace(free, weight_decay=decay, inverse_batch=1 / batch)
            steps.append(mean - functional.update_mean(mean, momentum, second * batch, hyper))
        np.testing.assert_allclose(steps[0], steps[1], rtol=1e-12)
        np.testing.assert_allclose(steps[0][:2], 0.3 * np.array([1.0 + decay * 1e3, 2.0 - 2 * decay]), rtol=1e-4)
        assert steps[0][2] == pytest.approx(0.3 * 3.0 * min(decay / 1e-8, 1.0))


@pytest.mark.parametrize("weight_decay", [0.0, 1e-4, 1.0])
def test_hess_plus_weight_decay_stays_positive_and_finite(weight_decay):
    """Any curvature estimate, a thousand times over: h + delta at most halves, and never reaches zero or infinity."""
    rng = np.random.default_rng(3)
    hyper = dataclasses.replace(IVON, weight_decay=weight_decay, rho=0.5)
    hess = np.full(2048, 1e-3, np.float32)
    with np.errstate(all="ignore"):
        for scale in (1.0, 1e10, 1e30, 1e-30, 1e3):
            for _ in range(200):
                before = hess + np.float32(weight_decay)
                f = (rng.standard_normal(2048) * scale).astype(np.float32)
                f[::3] = -hess[::3]  # the worst case: u = -1 and below, again and again
                f[1::3] = hess[1::3] - before[1::3] / np.float32(0.5)
                hess = functional.update_hessian(hess, f, hyper)
                after = hess + np.float32(weight_decay)
                assert (after > 0).all()
                assert np.isfinite(after).all()
                assert (after >= before * 0.5 * (1 - 1e-6) - np.spacing(np.float32(weight_decay))).all()
