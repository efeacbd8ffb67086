"""The equations: against the published form in float64, and the properties that hold for any input."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from ivon_lora.functional import ivon as reference
from ivon_lora.functional.ivon import Hyper
from tests.float64_oracle import Ivon64

HYPER = Hyper(
    ess=200.0,
    weight_decay=0.05,
    lr=0.3,
    beta1=0.8,
    beta1_complement=0.2,
    rho=0.1,
    clip_radius=1.5,
    debias=1 - 0.8**3,
    square_scale=200.0,
    inverse_batch=1 / 48,
    noise_ess=200.0,
    curvature="price",
    step_rule="newton",
)


@pytest.mark.parametrize(
    ("hess_approx", "step_rule"),
    [("price", "newton"), ("gradsq", "newton"), ("fisher", "newton"), ("fisher", "adam")],
)
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_one_step_equals_the_published_form_in_float64(kind, hess_approx, step_rule):
    rng = np.random.default_rng(1)
    mean, momentum, grad, eps = rng.standard_normal((4, 1000))
    hess = rng.uniform(0.01, 3, 1000)
    hess[:10] = 0.0 if hess_approx == "fisher" else hess[:10]
    oracle = Ivon64(mean, lr=0.3, ess=200, beta1=0.8, beta2=0.9, weight_decay=0.05, clip_radius=1.5, rescale_lr=False)
    oracle.hess_approx, oracle.step_rule, oracle.batch_size = hess_approx, step_rule, 48
    oracle.prior_weight = 0.4 if hess_approx == "fisher" else 1.0
    oracle.momentum, oracle.hess, oracle.t = momentum.copy(), hess.copy(), 2
    oracle.step([grad], [eps])
    scale = 200.0 if hess_approx == "gradsq" else 48.0
    hyper = dataclasses.replace(HYPER, curvature=hess_approx, step_rule=step_rule, square_scale=scale, prior_weight=0.4)
    args = [a if kind == "numpy" else torch.from_numpy(a) for a in (mean, momentum, hess, grad, eps)]
    curvature = reference.estimate_curvature(args[3], args[2], args[4], hyper)
    m, g, h, finite = reference.ivon_step(*args[:4], curvature, hyper, None)
    assert finite.all()
    for got, want in ((m, oracle.mean), (g, oracle.momentum), (h, oracle.hess)):
        # the two forms of the Hessian line round differently: a few ulps of the largest summand
        np.testing.assert_allclose(np.asarray(got), want, rtol=1e-12, atol=1e-12 * np.abs(want).max())


def test_numpy_and_torch_give_the_same_bits_in_fp32():
    rng = np.random.default_rng(2)
    mean, momentum, grad, eps = rng.standard_normal((4, 4096)).astype(np.float32)
    hess = rng.uniform(1e-4, 3, 4096).astype(np.float32)
    arrays = [mean, momentum, hess, grad]
    tensors = [torch.from_numpy(a) for a in arrays]
    active = rng.random(4096) < 0.9
    out = reference.ivon_step(*arrays, reference.estimate_curvature(grad, hess, eps, HYPER), HYPER, active)
    out_t = reference.ivon_step(
        *tensors,
        reference.estimate_curvature(tensors[3], tensors[2], torch.from_numpy(eps), HYPER),
        HYPER,
        torch.from_numpy(active),
    )
    for a, b in zip(out, out_t, strict=True):
        np.testing.assert_array_equal(np.asarray(a), b.numpy())
    theta = reference.draw_sample(mean, hess, eps, 200.0, 0.05)
    theta_t = reference.draw_sample(tensors[0], tensors[2], torch.from_numpy(eps), 200.0, 0.05)
    np.testing.assert_array_equal(theta, theta_t.numpy())
    np.testing.assert_array_equal(
        reference.posterior_std(hess, 200.0, 0.05), reference.posterior_std(tensors[2], 200.0, 0.05).numpy()
    )


@pytest.mark.parametrize("rho", [1.0, 1 / 3, 1e-3])
def test_the_running_mean_of_squares_never_turns_negative(rho):
    rng = np.random.default_rng(8)
    hess = np.full(4096, 3.0, np.float32)
    fisher = dataclasses.replace(HYPER, curvature="fisher", square_scale=48.0, rho=rho)
    with np.errstate(all="ignore"):
        for scale in (1.0, 1e-12, 1e-22, 1e18, 1e25, 1e-30, 0.0):
            grad = (rng.standard_normal(4096) * scale).astype(np.float32)
            hess = reference.update_hessian(hess, reference.estimate_curvature(grad, hess, None, fisher), fisher)
            assert (hess >= 0).all()
            assert np.isfinite(hess).all()


def test_adams_step_forgets_the_unit_of_the_batch_and_bounds_the_priors_pull():
    """h = B v: the same step for every B. A gradient of zero: the mean shrinks by lr, whatever the prior."""
    mean, momentum, second = np.array([1.0, -2.0, 3.0]), np.array([1e-3, 2.0, 0.0]), np.array([1e-6, 1.0, 0.0])
    for decay in (1e-7, 1e-4):
        steps = []
        for batch in (1.0, 640.0):
            hyper = dataclasses.replace(
                HYPER, step_rule="adam", weight_decay=decay, debias=1.0, inverse_batch=1 / batch, clip_radius=math.inf
            )
            steps.append(mean - reference.update_mean(mean, momentum, second * batch, hyper))
        np.testing.assert_allclose(steps[0], steps[1], rtol=1e-12)
        np.testing.assert_allclose(steps[0][:2], 0.3 * np.array([1.0 + decay * 1e3, 2.0 - 2 * decay]), rtol=1e-4)
        assert steps[0][2] == pytest.approx(0.3 * 3.0 * min(decay / 1e-8, 1.0))


@pytest.mark.parametrize("weight_decay", [0.0, 1e-4, 1.0])
def test_hess_plus_weight_decay_stays_positive_and_finite(weight_decay):
    """Any curvature estimate, a thousand times over: h + delta at most halves, and never reaches zero or infinity."""
    rng = np.random.default_rng(3)
    hyper = Hyper(**{**HYPER.__dict__, "weight_decay": weight_decay, "rho": 0.5})
    hess = np.full(2048, 1e-3, np.float32)
    with np.errstate(all="ignore"):
        for scale in (1.0, 1e10, 1e30, 1e-30, 1e3):
            for _ in range(200):
                before = hess + np.float32(weight_decay)
                f = (rng.standard_normal(2048) * scale).astype(np.float32)
                f[::3] = -hess[::3]  # the worst case: u = -1 and below, again and again
                f[1::3] = hess[1::3] - before[1::3] / np.float32(0.5)
                hess = reference.update_hessian(hess, f, hyper)
                after = hess + np.float32(weight_decay)
                assert (after > 0).all()
                assert np.isfinite(after).all()
                assert (after >= before * 0.5 * (1 - 1e-6) - np.spacing(np.float32(weight_decay))).all()


def test_elements_without_a_finite_update_keep_everything():
    n = 64
    rng = np.random.default_rng(4)
    mean, momentum, grad = rng.standard_normal((3, n)).astype(np.float32)
    hess = rng.uniform(0.1, 1, n).astype(np.float32)
    bad = [3, 10, 11, 40]
    grad[bad] = [np.nan, np.inf, -np.inf, np.nan]
    active = np.ones(n, bool)
    active[[5, 6]] = False
    with np.errstate(all="ignore"):
        curvature = reference.estimate_curvature(grad, hess, np.ones(n, np.float32), HYPER)
        m, g, h, finite = reference.ivon_step(mean, momentum, hess, grad, curvature, HYPER, active)
    assert np.flatnonzero(~finite).tolist() == bad
    still = [*bad, 5, 6]
    moved = np.setdiff1d(np.arange(n), still)
    for new, old in ((m, mean), (g, momentum), (h, hess)):
        np.testing.assert_array_equal(new[still], old[still])
        assert (new[moved] != old[moved]).all()
        assert np.isfinite(new).all()


def test_without_a_sample_the_hessian_stays():
    mean, momentum, grad, hess = (np.full(3, v, np.float32) for v in (1.0, 0.5, 0.2, 0.7))
    m, g, h, _ = reference.ivon_step(mean, momentum, hess, grad, None, HYPER, None)
    np.testing.assert_array_equal(h, hess)
    assert (m != mean).all()
    assert (g != momentum).all()


def test_clip_radius_bounds_the_step():
    mean, momentum, hess = np.zeros(4), np.zeros(4), np.full(4, 1e-3)
    grad = np.array([1e6, -1e6, 1e-9, 0.0])
    m, *_ = reference.ivon_step(mean, momentum, hess, grad, None, HYPER, None)
    assert m[0] == -HYPER.lr * HYPER.clip_radius
    assert m[1] == HYPER.lr * HYPER.clip_radius
    assert abs(m[2]) < HYPER.lr * HYPER.clip_radius


def test_posterior_std_is_the_reciprocal_root():
    hess = np.array([1e-6, 1.0, 1e6])
    np.testing.assert_allclose(
        reference.posterior_std(hess, 100.0, 0.5), [1 / math.sqrt(100 * (h + 0.5)) for h in hess], rtol=1e-15
    )
