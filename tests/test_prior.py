"""A prior per parameter tensor by empirical Bayes, VAdam's with prior_std="empirical": where it settles, its bounds."""

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ivon_lora import LoraAdapter, RankPruner, VAdam, load_posterior, save_posterior, snapshot_posterior
from ivon_lora.functional.prior import INTERVAL, RANGE, next_weight_decay, second_moment
from tests.compiler import BACKENDS

ESS = 1e4
START = 0.01  # delta at the start: of 10,000 examples at temperature 1, a standard deviation of 0.1


def make(params: Any, lr: float = 0.0, batch_size: int = 8, **options: Any) -> VAdam:
    options = {"num_examples": int(ESS), "temperature": 1.0, "noise_warmup": 0, "prior_std": "empirical", **options}
    optimizer = VAdam(params, lr, batch_size=batch_size, **options)
    for group in optimizer.param_groups:
        if group["empirical_prior"]:
            group["weight_decay"] = START
    return optimizer


def delta(optimizer: VAdam, p: Tensor) -> float:
    return float(optimizer.state[p]["weight_decay"])


def step(optimizer: VAdam, gradients: dict[nn.Parameter, Tensor]) -> None:
    optimizer.train()
    for p, grad in gradients.items():
        p.grad = grad.to(p.dtype)
    optimizer.step()


def test_the_next_decay_in_closed_form() -> None:
    """lambda 50, delta 0.1: variances 1 / (50 (h + 0.1)); the element with h = 0 counts as m = 0."""
    mean, hess = np.array([1.0, -2.0, 7.0]), np.array([0.3, 0.9, 0.0])
    np.testing.assert_allclose(second_moment(mean, hess, 50.0, 0.1), [1 + 1 / 20, 4 + 1 / 50, 1 / 5], rtol=1e-12)
    average = np.array([(1.05 + 4.02 + 0.2) / 3])
    assert next_weight_decay(average, 50.0, 0.01)[0] == pytest.approx(3 / (50 * 5.27), rel=1e-12)
    assert next_weight_decay(average, 50.0, 10.0)[0] == 10.0  # the bounds
    assert next_weight_decay(average, 50.0, 1e-5)[0] == pytest.approx(1e-5 * RANGE**2, rel=1e-12)


def evidence_maximum(estimates: np.ndarray, hess: np.ndarray) -> float:
    """delta that maximises the evidence of a linear-Gaussian model with orthogonal features, in float64.

    The maximum-likelihood estimate of theta_j is normal around it with variance 1 / (lambda h_j), and theta_j normal
    around 0 with variance 1 / (lambda delta): it maximises sum_j log N(estimate_j; 0, v_j), v_j the sum of both. The
    root of the derivative by log delta, by bisection.
    """
    low, high = math.log(1e-6), math.log(1e6)
    for _ in range(200):
        prior = 1 / (ESS * math.exp((low + high) / 2))
        v = prior + 1 / (ESS * hess)
        slope = prior * np.sum(1 / v - estimates**2 / v**2) / 2
        low, high = ((low + high) / 2, high) if slope > 0 else (low, (low + high) / 2)
    return math.exp(low)


@pytest.mark.parametrize(("scale", "narrows"), [(0.05, True), (0.5, False)])
def test_it_settles_at_the_maximum_of_the_evidence_where_that_is_narrower(scale: float, narrows: bool) -> None:
    """A conjugate model; many elements are badly determined. The batches come in pairs whose noise is opposite."""
    n, batch_size, steps = 1500, 16, 400
    rng = np.random.default_rng(0)
    hess = 10 ** rng.uniform(-4.1, -2.1, n) / scale**2
    estimates = scale * rng.standard_normal(n) + rng.standard_normal(n) / np.sqrt(ESS * hess)
    best = evidence_maximum(estimates, hess)
    assert (best > 1.5 * START) == narrows
    p = nn.Parameter(torch.zeros(n))
    optimizer, noise = make([p], batch_size=batch_size), np.sqrt(hess / batch_size) * rng.choice([-1.0, 1.0], n)
    for t in range(steps):
        optimizer.param_groups[0]["lr"] = 1.2 * scale * (1 - t / steps) ** 2
        optimizer.train()
        noise = -noise
        p.grad = torch.from_numpy(hess * (p.detach().double().numpy() - estimates) + noise).float()
        optimizer.step()
    best = max(best, START)
    assert delta(optimizer, p) == pytest.approx(best, rel=0.02)
    shrunk = hess * estimates / (hess + best)
    assert float(np.linalg.norm(p.detach().numpy() - shrunk) / np.linalg.norm(shrunk)) < 0.08


def expected(optimizer: VAdam, p: nn.Parameter, before: float, alive: Tensor | None = None) -> float:
    """From the true mean of the fp32 moments, rounded once."""
    state = optimizer.state[p]
    mean = state.get("mean", p.detach()).numpy()
    hess = state["hess"] if alive is None else torch.where(alive, state["hess"], 0.0)
    moments = second_moment(mean, hess.numpy(), ESS, np.float32(before))
    exact = sum((Fraction(float(v)) for v in moments.ravel()), Fraction(0)) / moments.size
    nearest = np.float32(float(exact))
    around = [nearest, np.nextafter(nearest, np.float32(0)), np.nextafter(nearest, np.float32(np.inf))]
    rounded = min(around, key=lambda x: abs(Fraction(float(x)) - exact))  # of a tie the first, which is even
    return float(next_weight_decay(np.array([rounded]), ESS, START)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_sum_is_exact_and_due_every_tenth_update(backend: str, dtype: torch.dtype) -> None:
    """Sums in double precision often leave the mean of a few numbers open; so does a sum of 10,001 of them."""
    generator = torch.Generator().manual_seed(3)
    sizes = [2] * 24 + [1, 3, 0, 10_001]
    params = [nn.Parameter((0.1 * torch.rand(n, generator=generator)).to(dtype)) for n in sizes]
    optimizer = make(params, 1e-3, backend=backend)
    for t in range(1, 2 * INTERVAL + 2):
        before = [delta(optimizer, p) if t > 1 else START for p in params]
        step(optimizer, {p: 0.1 * torch.randn(p.shape, generator=generator) for p in params})
        after = [delta(optimizer, p) for p in params]
        if t % INTERVAL:
            assert after == pytest.approx(before, rel=1e-7)
        else:
            for p, old, new in zip(params, before, after, strict=True):
                assert new == (expected(optimizer, p, old) if p.numel() else old)
    assert {optimizer.state[p]["weight_decay"].shape for p in params} == {()}
    assert len(set(after)) > 24


def test_elements_of_which_the_data_say_nothing_leave_the_prior_alone() -> None:
    """A of LoRA while B is zero: large initial values, no gradient. Nor do large means that the data hardly see."""
    a, unseen, b = (
        nn.Parameter(3 * torch.ones(4, 7)),
        nn.Parameter(torch.full((50,), 30.0)),
        nn.Parameter(torch.ones(7) / 50),
    )
    optimizer = make([a, unseen, b])
    for _ in range(6 * INTERVAL):
        step(optimizer, {a: torch.zeros(4, 7), unseen: torch.full((50,), 1e-6), b: torch.ones(7)})
    assert delta(optimizer, a) == delta(optimizer, unseen) == pytest.approx(START)
    assert torch.allclose(optimizer.posterior(unseen).stddev, torch.tensor(0.1), rtol=1e-3)
    assert delta(optimizer, b) == pytest.approx(1 / (ESS / 50**2), rel=0.1)  # of m alone, for sigma is small


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_pruned_for_good_do_not_count(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = params = [nn.Parameter(0.05 * torch.randn(s, generator=generator)) for s in ((4, 6), (5, 4))]
    pruner = RankPruner([LoraAdapter("x", a, b)], 2, total_steps=30, warmup=0, final=26, interval=1)
    optimizer = make(params, 1e-3, pruner=pruner, backend=backend)
    for _ in range(2 * INTERVAL):
        before = [delta(optimizer, p) if p in optimizer.state else START for p in params]
        step(optimizer, {p: 0.1 * torch.randn(p.shape, generator=generator) for p in params})
    mask = optimizer.state[a]["rank_mask"]
    assert int(mask.sum()) == 2
    assert delta(optimizer, a) == expected(optimizer, a, before[0], mask[:, None])
    assert delta(optimizer, b) == expected(optimizer, b, before[1], mask)


def test_updates_are_counted_per_parameter_and_need_a_sample() -> None:
    p, q = (nn.Parameter(torch.full((3,), 0.02)) for _ in range(2))
    optimizer = make([p, q])
    q.requires_grad_(False)
    for t in range(2 * INTERVAL):
        q.requires_grad_(t >= 5)
        step(optimizer, {p: torch.ones(3), **({q: torch.ones(3)} if t >= 5 else {})})
        assert (delta(optimizer, p) > 2 * START) == (t >= INTERVAL - 1)
        assert t < 5 or (delta(optimizer, q) > 2 * START) == (t >= INTERVAL + 4)
    optimizer = make([p], 1e-9)  # at 0, it would be a rehearsal
    for _ in range(INTERVAL - 1):
        step(optimizer, {p: torch.ones(3)})
    with pytest.warns(UserWarning, match="without a posterior sample"):
        optimizer.step()
    assert delta(optimizer, p) == pytest.approx(START)


def test_posterior_scores_files_and_metrics_use_it(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    generator, names = torch.Generator().manual_seed(1), ["a", "b", "c", "d"]
    params = [nn.Parameter(0.1 * torch.randn(s, generator=generator)) for s in ((4, 33), (21, 4), (130,), (6,))]
    pruner = RankPruner([LoraAdapter("x", params[0], params[1])], 2, total_steps=16, warmup=1, final=5, interval=2)
    optimizer = make([{"params": params[:3]}, {"params": params[3:], "prior_std": 0.2}], 1e-3, pruner=pruner)
    for _ in range(INTERVAL):
        step(optimizer, {p: 0.1 * torch.randn(p.shape, generator=generator) for p in params})
    fixed = 1 / (ESS * 0.2**2)
    for p in params:
        state = optimizer.state[p]
        own = state.get("weight_decay", torch.tensor(fixed)).double()
        sigma = (ESS * (state["hess"].double() + own)).rsqrt()
        torch.testing.assert_close(optimizer.posterior(p).stddev, sigma.float())
        torch.testing.assert_close(optimizer.snr(p), (p.detach().double().abs() / sigma).float())
    a, b = (optimizer.snr(p, "snr_abs") for p in params[:2])
    np.testing.assert_allclose(optimizer.rank_table()[0]["scores"], a.mean(1) + b.mean(0), rtol=1e-6)
    save_posterior(optimizer, tmp_path / "posterior", names)
    loaded = load_posterior(tmp_path / "posterior")
    assert loaded.groups == snapshot_posterior(optimizer, names).groups
    decays = {n: delta(optimizer, p) for n, p in zip(names[:3], params[:3], strict=True)}
    assert loaded.groups[0]["weight_decays"] == pytest.approx(decays)
    assert "weight_decays" not in loaded.groups[1]
    stds = [1 / math.sqrt(ESS * d) for d in decays.values()]
    found = optimizer.metrics()
    assert (found["prior/std_min"], found["prior/std_max"]) == pytest.approx((min(stds), max(stds)))
    assert "prior/std_min" not in make([nn.Parameter(torch.ones(2))], prior_std=0.1).metrics()
