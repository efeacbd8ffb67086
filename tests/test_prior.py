"""A prior per parameter tensor by empirical Bayes: where it settles, its bounds, its way through state and files."""

import copy
import math
import pickle
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ivon_lora import IVON, LoraAdapter, RankPruner
from ivon_lora.backends import Work
from ivon_lora.backends.eager import BlockedEager, TensorEager
from ivon_lora.functional.ivon import Hyper
from ivon_lora.functional.noise import NoiseKey
from ivon_lora.layout import addresses
from ivon_lora.optim.metrics import metrics
from ivon_lora.optim.param_groups import WARM_UP
from ivon_lora.posterior.posterior import load_posterior, save_posterior, snapshot_posterior
from ivon_lora.prior import INTERVAL, RANGE, Posterior, Sums, next_decays, next_weight_decay, second_moment, set_decays
from tests.compiler import COMPILE

#: weight_decay at the start: for ess = 1000, a prior of variance 2
START = 5e-4
EMPIRICAL: dict[str, Any] = {
    "hess_approx": "fisher", "batch_size": 8, "weight_decay": START, "hess_init": "auto", "beta2": "auto",
    "prior": "empirical",
}  # fmt: skip


def delta(optimizer: IVON, p: Tensor) -> float:
    return float(optimizer.state[p]["weight_decay"])


# ---------------------------------------------------------------- the equations


def test_the_next_decay_in_closed_form() -> None:
    """lambda 50, delta 0.1: variances 1 / (50 (h + 0.1)); the element with h = 0 counts as m = 0."""
    mean, hess = np.array([1.0, -2.0, 7.0]), np.array([0.3, 0.9, 0.0])
    moments = second_moment(mean, hess, 50.0, 0.1)
    np.testing.assert_allclose(moments, [1 + 1 / 20, 4 + 1 / 50, 1 / 5], rtol=1e-12)
    average = np.array([(1.05 + 4.02 + 0.2) / 3])
    assert next_weight_decay(average, 50.0, 0.01)[0] == pytest.approx(3 / (50 * 5.27), rel=1e-12)
    assert next_weight_decay(average, 50.0, 10.0)[0] == 10.0  # the bounds
    assert next_weight_decay(average, 50.0, 1e-5)[0] == pytest.approx(1e-5 * RANGE**2, rel=1e-12)


def evidence_maximum(estimates: np.ndarray, hess: np.ndarray, ess: float) -> float:
    """delta that maximises the evidence of a linear-Gaussian model with orthogonal features, in float64.

    The maximum-likelihood estimate of theta_j is normal around it with variance 1 / (lambda h_j), and theta_j normal
    around 0 with variance 1 / (lambda delta): it maximises sum_j log N(estimate_j; 0, v_j), v_j the sum of both. The
    root of the derivative by log delta, by bisection.
    """
    low, high = math.log(1e-6), math.log(1e6)
    for _ in range(200):
        prior = 1 / (ess * math.exp((low + high) / 2))
        v = prior + 1 / (ess * hess)
        slope = prior * np.sum(1 / v - estimates**2 / v**2) / 2
        low, high = ((low + high) / 2, high) if slope > 0 else (low, (low + high) / 2)
    return math.exp(low)


@pytest.mark.parametrize(
    ("step_rule", "lr", "prior_std"),
    [("newton", 0.1, 1.2), ("newton", 0.1, 3.0), ("adam", 0.6, 1.2), ("newton", 0.1, 0.2)],
    ids=["wide", "wider", "adam", "narrow"],
)
def test_it_settles_at_the_maximum_of_the_evidence(step_rule: str, lr: float, prior_std: float) -> None:
    """A conjugate model, for whose posterior the Gaussian family is exact; many elements are badly determined.

    Where the prior starts narrower than that, it stays there.

    The batches come in pairs whose noise is opposite, and of the size that it has in a model that fits.
    """
    n, ess, batch_size = 1500, 1e4, 16
    rng = np.random.default_rng(0)
    hess = 10 ** rng.uniform(-3.5, -1.5, n)
    estimates = 0.5 * rng.standard_normal(n) + rng.standard_normal(n) / np.sqrt(ess * hess)
    best = evidence_maximum(estimates, hess, ess)
    p = nn.Parameter(torch.zeros(n))
    optimizer = IVON(
        [p], 1.0, ess, **{**EMPIRICAL, "batch_size": batch_size, "step_rule": step_rule}, prior_std=prior_std
    )
    steps, noise = 400, np.sqrt(hess / batch_size) * rng.choice([-1.0, 1.0], n)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps) ** 2
        optimizer.train()
        noise = -noise
        p.grad = torch.from_numpy(hess * (p.detach().double().numpy() - estimates) + noise).float()
        optimizer.step()
    start = optimizer.param_groups[0]["weight_decay"]
    assert abs(start / best - 1) > 0.5
    best = max(best, start)
    assert delta(optimizer, p) == pytest.approx(best, rel=0.02)
    shrunk = hess * estimates / (hess + best)
    assert float(np.linalg.norm(p.detach().numpy() - shrunk) / np.linalg.norm(shrunk)) < 0.03


def test_the_mean_is_the_true_one_rounded_once_in_any_order() -> None:
    generator = torch.Generator().manual_seed(3)
    n = 100_001
    mean, hess = torch.randn(n, generator=generator), torch.rand(n, generator=generator)
    found = set()
    for order in (torch.arange(n), torch.randperm(n, generator=generator)):
        own = torch.tensor(0.1)
        param = nn.Parameter(mean[order].clone())
        work = Work(0, param, param.detach(), torch.zeros(n), hess[order].clone(), own_decay=own)
        set_decays(next_decays([Posterior(param, work, 9.0, 0.1)]))
        found.add(own.item())
    values = second_moment(mean.numpy(), hess.numpy(), 9.0, np.float32(0.1))
    exact = sum((Fraction(float(v)) for v in values), Fraction(0)) / n
    average = np.float32(float(exact))  # n is odd: no tie of the second rounding
    assert found == {float(next_weight_decay(np.array([average]), 9.0, 0.1)[0])}


def test_sums_that_leave_the_mean_open_are_made_exactly() -> None:
    """Means of two numbers of one magnitude: every other one lies between two fp32 numbers, and the even one is it."""
    generator = torch.Generator().manual_seed(7)
    works, totals, expected, ties = [], [], [], 0
    for _ in range(40):
        param, hess = 1 + torch.rand(2, generator=generator) / 8, 1e3 + torch.rand(2, generator=generator)
        work = Work(0, param, param, param, hess, own_decay=torch.tensor(0.1))
        values = second_moment(param.numpy(), hess.numpy(), 9.0, np.float32(0.1)).astype(np.float64)
        average = np.array([values.mean()], np.float32)  # the float64 mean of two fp32 numbers is exact
        ties += float(average[0]) != values.mean()
        works.append(work)
        totals.append(float(values.sum()))
        expected.append(float(next_weight_decay(average, 9.0, 0.1)[0]))
    assert 10 < ties < 30
    works.append(Work(0, torch.empty(0), torch.empty(0), torch.empty(0), torch.empty(0), own_decay=torch.tensor(0.7)))
    counts, own = np.array([2] * 40 + [0]), [w.own_decay for w in works if w.own_decay is not None]
    set_decays(next_decays([Sums(works, addresses(own), counts, 9.0, 0.1, np.array([*totals, 0.0]))]))
    found = [float(decay) for decay in own]
    assert found[:-1] == expected
    assert found[-1] == np.float32(0.7), "nothing is known of no elements"


def test_no_prior_changes_before_the_hessian_is_known() -> None:
    assert WARM_UP <= INTERVAL


# ---------------------------------------------------------------- bounds


def test_elements_of_which_the_data_say_nothing_leave_the_prior_alone() -> None:
    """A of LoRA while B is zero: large initial values, no gradient, 500 updates."""
    a, b = nn.Parameter(3 * torch.ones(4, 7)), nn.Parameter(torch.full((7,), 2.0))
    optimizer = IVON([a, b], 0.0, 100.0, **EMPIRICAL)
    for _ in range(500):
        optimizer.train()
        a.grad, b.grad = torch.zeros_like(a), torch.ones_like(b)
        optimizer.step()
    assert delta(optimizer, a) == pytest.approx(START, rel=1e-5)
    assert delta(optimizer, b) > 2e-3  # 1 / (100 * 4) as soon as sigma is small


def test_the_prior_stays_within_its_range() -> None:
    """B of LoRA at zero with a gradient narrows its prior; large means that the data hardly see do not widen it."""
    zero, large = nn.Parameter(torch.zeros(50)), nn.Parameter(torch.full((50,), 30.0))
    optimizer = IVON([zero, large], 0.0, 100.0, **{**EMPIRICAL, "weight_decay": 0.02})
    before, seen = float(np.float32(0.02)), []
    for step in range(1, 300):
        optimizer.train()
        zero.grad, large.grad = torch.full((50,), 0.3), torch.full((50,), 1e-6)
        optimizer.step()
        seen.append(delta(optimizer, zero))
        assert seen[-1] == pytest.approx(before, rel=1e-6) or step % INTERVAL == 0
        assert before <= seen[-1] <= 0.02 * RANGE**2 * (1 + 1e-6)
        before = seen[-1]
    assert seen[-1] == pytest.approx(0.02 * RANGE**2)
    assert delta(optimizer, large) == pytest.approx(0.02)
    sigma = optimizer.posterior(large).stddev
    assert torch.allclose(sigma, torch.tensor(1 / math.sqrt(100 * 0.02)), rtol=1e-3)  # its cap


def test_ranks_pruned_for_good_do_not_count() -> None:
    generator = torch.Generator().manual_seed(0)
    params: list[Tensor] = [nn.Parameter(torch.randn(s, generator=generator)) for s in ((4, 6), (5, 4))]
    a, b = params
    pruner = RankPruner([LoraAdapter("x", a, b)], 2, total_steps=20, warmup=0, final=16, interval=1)
    optimizer = IVON(params, 1e-3, 100.0, pruner=pruner, **EMPIRICAL)
    for _ in range(2 * INTERVAL):
        optimizer.train()
        a.grad, b.grad = torch.randn(4, 6, generator=generator), torch.randn(5, 4, generator=generator)
        before = delta(optimizer, a)
        optimizer.step()
    alive = optimizer.state[a]["rank_mask"]
    assert int(alive.sum()) == 2
    moments = second_moment(a.detach().numpy(), optimizer.state[a]["hess"].numpy(), 100.0, np.float32(before))
    average = (moments[alive.numpy()].sum() + 2 * 6 / (100.0 * before)) / 24  # the others as if they were at the prior
    assert delta(optimizer, a) == pytest.approx(1 / (100.0 * average), rel=1e-5)


# ---------------------------------------------------------------- every backend, groups, dtypes


class Bed:
    """Four tensors in two groups, the second with a fixed prior; gradients from a generator of their own."""

    def __init__(self, backend: str, dtype: torch.dtype = torch.float32, pruned: bool = False, **options: Any) -> None:
        generator = torch.Generator().manual_seed(1)
        shapes = ((4, 33), (21, 4), (130,), (6,))
        self.params = [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]
        self.gradients = torch.Generator().manual_seed(2)
        pruner = None
        if pruned:
            adapter = LoraAdapter("x", self.params[0], self.params[1])
            pruner = RankPruner([adapter], 2, total_steps=16, warmup=1, final=5, interval=2)
        groups: list[dict[str, Any]] = [{"params": self.params[:3]}, {"params": self.params[3:], "prior": "fixed"}]
        options = {**EMPIRICAL, "clip_radius": 3.0, **options}
        self.optimizer = IVON(groups, 1e-2, 1e3, backend=backend, pruner=pruner, seed=4, **options)

    def step(self, resample: bool = False) -> None:
        self.optimizer.train()
        for p in self.params:
            p.grad = torch.randn(p.shape, generator=self.gradients).to(p.dtype) * 0.1 + 0.01 * p.detach()
        self.optimizer.step(resample=resample)

    def values(self) -> dict[str, Tensor]:
        found = {}
        for i, p in enumerate(self.params):
            for name, value in {"param": p.detach(), **self.optimizer.state[p]}.items():
                found[f"{i}.{name}"] = value.clone()
        return found


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Priors change after every second update: steps in Triton's interpreter are slow."""
    monkeypatch.setattr("ivon_lora.prior.INTERVAL", 2)


@pytest.mark.usefixtures("_soon")
@pytest.mark.parametrize(
    ("backend", "dtype", "options"),
    [
        pytest.param("triton", torch.float32, {"pruned": True}, id="triton-pruned"),
        pytest.param("triton", torch.bfloat16, {"step_rule": "adam"}, id="triton-adam"),
        pytest.param(*COMPILE.values, torch.float32, {"pruned": True}, id="compile-pruned", marks=COMPILE.marks),
        pytest.param(*COMPILE.values, torch.bfloat16, {"step_rule": "adam"}, id="compile-adam", marks=COMPILE.marks),
        pytest.param(
            *COMPILE.values, torch.float32, {"hess_approx": "gradsq"}, id="compile-gradsq", marks=COMPILE.marks
        ),
    ],
)
def test_backends_have_the_same_bits(backend: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    options = {"beta2": 0.9, "hess_init": 0.5, **options}
    eager, other = Bed("eager", dtype, **options), Bed(backend, dtype, **options)
    for step in range(1, 6):
        eager.step()
        other.step()
        assert same(eager.values(), other.values()), step
        decays = {delta(eager.optimizer, p) for p in eager.params[:3]}
        assert len(decays) == (1 if step < 2 else 3)
    assert "weight_decay" not in eager.optimizer.state[eager.params[3]]
    for p in eager.params[:3]:
        assert eager.optimizer.state[p]["weight_decay"].shape == ()
        assert eager.optimizer.state[p]["weight_decay"].dtype == torch.float32


HYPER = Hyper(
    ess=70.0, weight_decay=0.01, lr=0.1, beta1=0.9, beta1_complement=0.1, rho=0.2, clip_radius=0.7, debias=0.5,
    square_scale=8.0, inverse_batch=1 / 8, noise_ess=70.0, curvature="fisher", step_rule="adam",
)  # fmt: skip


@pytest.mark.parametrize(
    "hyper", [HYPER, replace(HYPER, curvature="gradsq", step_rule="newton")], ids=["adam", "gradsq"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whole_tensors_and_blocks_read_it_alike(hyper: Hyper, dtype: torch.dtype) -> None:
    """The eager backend of any device, and that of the CPU, which packs tensors of different deltas together."""
    found = []
    for backend in (BlockedEager(), TensorEager()):
        generator = torch.Generator().manual_seed(6)
        works = []
        for index, decay in enumerate((None, 0.5, 3e-5)):
            p, m, h, g = (torch.randn(7, 9, generator=generator, dtype=dtype) for _ in range(4))
            own = None if decay is None else torch.tensor(decay)
            works.append(Work(index, p, p.clone(), m, 1e-3 * h.abs(), g, own_decay=own))
        for w in works:
            w.hess[0] = 0.0  # here the pull min(delta, sqrt(h / B)) is the root
        backend.sample(works, hyper, NoiseKey(1, 2))
        samples = [w.param.clone() for w in works]
        backend.step(works, hyper, NoiseKey(1, 2), 1)
        found.append([*samples, *(x for w in works for x in (w.param, w.momentum, w.hess))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    noise = [(w.mean - s).abs().max() for w, s in zip(works, samples, strict=True)]
    assert noise[1] < noise[0] < noise[2]
    for x in (torch.float32, torch.float64):
        mean, hess = (torch.rand(1000, generator=generator, dtype=x) for _ in range(2))
        moments = second_moment(mean, hess, 70.0, torch.tensor(0.3))
        assert np.array_equal(moments.numpy(), second_moment(mean.numpy(), hess.numpy(), 70.0, np.float32(0.3)))


@pytest.mark.parametrize("backend", [COMPILE])
def test_sums_of_moments_are_those_of_numpy(backend: str) -> None:
    """Ranks pruned along either dimension, elements without curvature, odd sizes, fp32 means of bf16 parameters."""
    from ivon_lora.backends import make_backend

    generator = torch.Generator().manual_seed(8)
    works, expected = [], []
    for index, (shape, rank_dim) in enumerate((((5, 1303), 0), ((701, 6), 1), ((4099,), None), ((3,), None))):
        mean, hess = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)
        hess.view(-1)[:2] = 0.0
        work = Work(index, mean.bfloat16(), mean, mean, hess, mean_state=mean, own_decay=torch.tensor(0.1 + index))
        alive = torch.ones(shape, dtype=torch.bool)
        if rank_dim is not None:
            work.rank_mask, work.rank_dim = torch.rand(shape[rank_dim], generator=generator) > 0.5, rank_dim
            assert 0 < int(work.rank_mask.sum()) < shape[rank_dim]
            alive = work.rank_mask[:, None] if rank_dim == 0 else work.rank_mask
        works.append(work)
        decay = np.float32(0.1 + index)
        moments = second_moment(mean.numpy(), torch.where(alive, hess, 0.0).numpy(), 70.0, decay)
        expected.append(math.fsum(moments.astype(np.float64).ravel()))
    sums = make_backend(backend, torch.device("cpu")).moment_sums(works, 70.0)
    assert sums is not None
    np.testing.assert_allclose(sums, expected, rtol=4200 * 2.0**-53)  # one rounding of each addition


@pytest.mark.usefixtures("_soon")
def test_step_and_sample_in_one_launch() -> None:
    """In a step that changes priors the sample waits for them; in the others it has the tensor's own."""
    pytest.importorskip("triton")
    options: dict[str, Any] = {"beta2": 0.9, "hess_init": 0.5}
    plain, resampled = Bed("triton", **options), Bed("triton", **options)
    for _ in range(3):
        plain.step()
        resampled.step(resample=True)
    plain.optimizer.train()
    assert same(plain.values(), resampled.values())


@pytest.mark.parametrize("backend", ["eager", COMPILE])
def test_fp64_goes_the_same_way(backend: str) -> None:
    single, double = Bed(backend), Bed(backend, torch.float64)
    for _ in range(INTERVAL + 3):
        single.step()
        double.step()
    for p, q in zip(single.params[:3], double.params[:3], strict=True):
        assert delta(double.optimizer, q) == pytest.approx(delta(single.optimizer, p), rel=1e-3)
        assert double.optimizer.state[q]["hess"].dtype == torch.float64


def test_groups_have_starts_and_priors_of_their_own() -> None:
    p, q, r = (nn.Parameter(torch.full((3,), 0.5)) for _ in range(3))
    groups: list[dict[str, Any]] = [{"params": [p]}, {"params": [q], "prior_std": 0.5}, {"params": [r]}]
    groups[2] |= {"prior": "fixed", "weight_decay": 0.0, "hess_approx": "price", "hess_init": 1.0, "beta2": 0.9}
    optimizer = IVON(groups, 0.1, 100.0, **EMPIRICAL)
    optimizer.train()
    for x in (p, q, r):
        x.grad = torch.ones_like(x)
    optimizer.step()
    assert delta(optimizer, p) == pytest.approx(START)
    assert delta(optimizer, q) == pytest.approx(1 / (100 * 0.5**2))
    assert "weight_decay" not in optimizer.state[r]


def test_a_frozen_parameter_keeps_its_prior_and_a_thawed_one_has_its_own_schedule() -> None:
    bed = Bed("eager")
    bed.params[2].requires_grad_(False)
    for _ in range(INTERVAL):
        bed.step()
    first = bed.values()
    bed.params[2].requires_grad_(True)
    for step in range(1, INTERVAL + 1):
        bed.step()
        changed = bed.optimizer.state[bed.params[2]]["weight_decay"] != torch.tensor(START)
        assert bool(changed) == (step == INTERVAL)
    assert "2.hess" not in first
    assert first["0.weight_decay"] != bed.values()["0.weight_decay"]


def test_a_step_without_a_sample_changes_no_prior() -> None:
    bed = Bed("eager")
    for _ in range(INTERVAL - 1):
        bed.step()
    for p in bed.params:
        p.grad = torch.ones_like(p)
    with pytest.warns(UserWarning, match="without a posterior sample"):
        bed.optimizer.step()
    assert {delta(bed.optimizer, p) for p in bed.params[:3]} == {float(torch.tensor(START))}


def test_the_prior_can_be_switched_while_training() -> None:
    bed = Bed("eager")
    for _ in range(INTERVAL):
        bed.step()
    own = delta(bed.optimizer, bed.params[2])
    group = bed.optimizer.param_groups[0]
    group["prior"] = "fixed"
    hess = bed.optimizer.state[bed.params[2]]["hess"]
    torch.testing.assert_close(bed.optimizer.posterior(bed.params[2]).variance, 1 / (1e3 * (hess + START)))
    drawn = []
    for prior, decay in (("fixed", START), ("empirical", own)):
        group["prior"] = prior
        mean = bed.params[2].detach().clone()
        bed.optimizer.train()
        drawn.append((bed.params[2].detach() - mean) * (hess + decay).sqrt())
        bed.optimizer.eval()
    torch.testing.assert_close(drawn[0], drawn[1], rtol=1e-3, atol=1e-5)  # the same eps


# ---------------------------------------------------------------- state, files, metrics


@pytest.mark.parametrize("live", [False, True], ids=["mean", "sampled"])
def test_resumed_exactly(live: bool) -> None:
    bed, fresh = Bed("eager", pruned=True), Bed("eager", pruned=True)
    for _ in range(INTERVAL + 2):
        bed.step()
    if live:
        bed.optimizer.train()
    saved = pickle.loads(pickle.dumps(bed.optimizer.state_dict()))
    for p, q in zip(bed.params, fresh.params, strict=True):
        with torch.no_grad():
            q.copy_(p)
    fresh.optimizer.load_state_dict(saved)
    fresh.gradients.set_state(bed.gradients.get_state())
    twin = copy.deepcopy(bed)
    for _ in range(INTERVAL):
        bed.step()
        fresh.step()
        twin.step()
    assert same(bed.values(), fresh.values())
    assert same(bed.values(), twin.values())


def test_old_checkpoints_have_fixed_priors_and_damaged_ones_are_refused() -> None:
    bed, old = Bed("eager"), Bed("eager", prior="fixed")
    bed.step()
    old.step()
    saved = old.optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["prior"]
    bed.optimizer.load_state_dict(saved)
    assert bed.optimizer.param_groups[0]["prior"] == "fixed"
    bed = Bed("eager")
    bed.step()
    saved = bed.optimizer.state_dict()
    for value, message in (
        (torch.tensor(float("nan")), "weight_decay of parameter 1 is nan, not a positive number: the checkpoint is"),
        (torch.ones(2), r"weight_decay of parameter 1 is \(2,\), not a tensor of one element"),
    ):
        saved["state"][1]["weight_decay"] = value
        with pytest.raises(ValueError, match=message):
            bed.optimizer.load_state_dict(saved)


def test_posterior_scores_files_and_metrics_use_it(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    bed = Bed("eager", pruned=True)
    for _ in range(INTERVAL):
        bed.step()
    optimizer, names = bed.optimizer, ["a", "b", "c", "d"]
    for p in bed.params:
        state = optimizer.state[p]
        own = state.get("weight_decay", torch.tensor(START)).double()
        sigma = (1e3 * (state["hess"].double() + own)).rsqrt()
        torch.testing.assert_close(optimizer.posterior(p).stddev, sigma.float())
        torch.testing.assert_close(optimizer.snr(p), (p.detach().double().abs() / sigma).float())
    assert optimizer.pruner is not None
    (score,) = optimizer.pruner.scores(optimizer)
    a, b = (optimizer.snr(p, "snr_abs") for p in bed.params[:2])
    torch.testing.assert_close(score, a.mean(1) + b.mean(0))
    save_posterior(optimizer, tmp_path / "posterior", names)
    loaded = load_posterior(tmp_path / "posterior")
    assert loaded.groups == snapshot_posterior(optimizer, names).groups
    own = {n: delta(optimizer, p) for n, p in zip(names[:3], bed.params[:3], strict=True)}
    assert loaded.groups[0]["weight_decays"] == pytest.approx(own)
    assert "weight_decays" not in loaded.groups[1]
    stds = [1 / math.sqrt(1e3 * d) for d in own.values()]
    found = metrics(optimizer)
    assert (found["prior/std_min"], found["prior/std_max"]) == pytest.approx((min(stds), max(stds)))
    assert "prior/std_min" not in metrics(Bed("eager", prior="fixed").optimizer)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": "flat"}, "prior must be one of 'fixed', 'empirical', got 'flat'"),
        ({"hess_approx": "price"}, "prior='empirical' needs hess_approx='fisher' or 'gradsq', got 'price'"),
        ({"weight_decay": 0.0, "hess_approx": "gradsq", "hess_init": 1.0}, r"prior='empirical' needs weight_decay > 0"),
    ],
    ids=["name", "price", "flat"],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IVON([nn.Parameter(torch.ones(2))], 0.1, 10.0, **{**EMPIRICAL, **options})


def test_from_adamw_takes_it() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = IVON.from_adamw([p], num_examples=10, batch_size=2, prior="empirical")
    assert optimizer.param_groups[0]["prior"] == "empirical"
