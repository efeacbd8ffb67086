"""`step()` reads `p.grad` as it stands: clipped, unscaled, missing, sparse, not finite, accumulated."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ivon_lora import IVON
from tests.optimizer_problem import (
    HYPER,
    Oracle,
    differing,
    equal,
    gradient,
    make_params,
    new,
    photo,
    quadratic,
    run,
    train_step,
    values,
)


def backward(optimizer: IVON, params: list[nn.Parameter], batch: int, context: bool, scale: float = 1.0) -> None:
    """At a sample that a context or `train()` draws."""
    optimizer.zero_grad()
    if not context:
        optimizer.train()
    with optimizer.sampled_params(train=True) if context else nullcontext():
        (scale * quadratic(params, batch)).backward()


@pytest.mark.parametrize("context", [False, True])
def test_clipping_after_backward_has_effect(context: bool) -> None:
    params = make_params()
    optimizer, oracle = new(params), Oracle(params, HYPER)
    for batch in range(5):
        backward(optimizer, params, batch, context)
        torch.nn.utils.clip_grad_norm_(params, 0.5)
        optimizer.step()
        grads = [gradient(oracle.theta(i), i, batch) for i in range(len(params))]
        norm = np.sqrt(sum((g**2).sum() for g in grads))
        oracle.step([[g * 0.5 / max(norm, 0.5) for g in grads]])
        oracle.check(optimizer, params, rtol=2e-5)


@pytest.mark.parametrize("context", [False, True])
def test_grad_scaler(context: bool) -> None:
    """Scaled loss, `unscale_` inside `scaler.step`: the run is that without a scaler (a power of two loses no bits)."""
    params, others = make_params(), make_params()
    optimizer, plain = new(params), new(others)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(1))  # makes the scale
    for batch in range(4):
        backward(optimizer, params, batch, context, scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
        backward(plain, others, batch, context)
        plain.step()
    assert differing(photo(optimizer), photo(plain)) == []


def test_parameter_without_gradient_is_skipped_and_skips_no_noise() -> None:
    params = make_params()
    optimizer, oracle = new(params), Oracle(params, HYPER)
    for batch in range(6):
        optimizer.zero_grad()
        optimizer.train()
        used = [i for i in range(len(params)) if (batch + i) % 3]
        before = photo(optimizer)
        quadratic(params, batch).backward()
        for i in set(range(len(params))) - set(used):
            params[i].grad = None
        optimizer.step()
        oracle.step([[gradient(oracle.theta(i), i, batch) if i in used else None for i in range(len(params))]])
        for i, p in enumerate(params):
            if i not in used:
                assert all(torch.equal(optimizer.state[p][k], before[f"{i}/{k}"]) for k in ("step", "momentum", "hess"))
    oracle.check(optimizer, params)
    assert [optimizer.state[p]["step"].item() for p in params] == [o.t for o in oracle.each]


@pytest.mark.parametrize("moment", ["in mean", "in sampled"])
def test_frozen_later_and_thawed_again(moment: str) -> None:
    """Thawed under a live sample it holds its mean, so its Hessian stays for that step."""
    params = make_params()
    optimizer, oracle = new(params), Oracle(params, HYPER)
    frozen = params[0]
    for batch in range(6):
        if batch != 3:
            optimizer.zero_grad()  # in step 3 the frozen parameter has a gradient left
        if batch in (2, 4) and moment == "in mean":
            frozen.requires_grad_(batch == 4)
        optimizer.train()
        if batch == 2 and moment == "in mean":
            np.testing.assert_allclose(frozen.numpy(), oracle.each[0].mean, rtol=1e-5)
        if batch in (2, 4) and moment == "in sampled":
            frozen.requires_grad_(batch == 4)
        if batch == 3:
            frozen.grad = torch.ones_like(frozen)
            for p in params[1:]:
                p.grad = None
        quadratic(params, batch).backward()
        grads: list[np.ndarray | None] = [gradient(oracle.theta(i), i, batch) for i in range(len(params))]
        late = batch == 4 and moment == "in sampled"
        if batch in (2, 3):
            grads[0] = None
        elif late:
            grads[0] = gradient(oracle.each[0].mean, 0, batch)
        optimizer.step()
        oracle.each[0].beta2 = 1.0 if late else HYPER["beta2"]
        oracle.step([grads])
        oracle.check(optimizer, params)


@pytest.mark.parametrize("how", ["train", "two contexts", "closure of two"])
def test_sparse_gradient_leaves_everything_untouched(how: str) -> None:
    dense, embedding = nn.Parameter(torch.randn(3)), nn.Embedding(5, 3, sparse=True)
    params = [dense, embedding.weight]
    optimizer, before = new(params, mc_samples=2), values(params)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (embedding(torch.tensor([1, 2])) * dense).square().sum()
        loss.backward()
        return loss

    def attempt() -> None:
        if how == "two contexts":
            for _ in range(2):
                with optimizer.sampled_params(train=True):
                    closure()
        elif how == "train":
            optimizer.train()
            closure()
        optimizer.step(closure if how == "closure of two" else None)

    with pytest.raises(RuntimeError, match=r"sparse.*sparse=False"):
        attempt()
    optimizer.eval()
    assert equal(params, before)
    assert optimizer.completed_steps == 0
    for state in optimizer.state.values():
        assert not state["momentum"].any()
        assert (state["hess"] == 1.0).all()
        assert state["step"] == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("hess_approx", ["price", "gradsq"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("samples", [0, 1, 2])
@pytest.mark.filterwarnings("ignore:.*without a posterior sample")
def test_elements_without_a_finite_gradient_stay(
    value: float, hess_approx: str, dtype: torch.dtype, samples: int
) -> None:
    """At the mean, at a sample, or at the first of two samples; all other elements are updated as ever."""
    params, others = make_params(dtype=dtype), make_params(dtype=dtype)
    optimizer, plain = new(params, hess_approx=hess_approx), new(others, hess_approx=hess_approx)
    for o, ps in ((optimizer, params), (plain, others)):
        train_step(o, ps, 0)
    before = photo(optimizer)
    for o, ps in ((optimizer, params), (plain, others)):
        o.zero_grad()
        for sample in range(max(samples, 1)):
            with o.sampled_params(train=True) if samples else nullcontext():
                quadratic(ps, 1).backward()
                for p in (params[0], params[3]) if o is optimizer and sample == 0 else ():
                    assert p.grad is not None
                    p.grad.view(-1)[[1, 7]] = value
        o.step()
    assert optimizer.metrics()["grad/nonfinite"] == 4
    assert plain.metrics()["grad/nonfinite"] == 0
    found, undisturbed = photo(optimizer), photo(plain)
    for name in found.keys() - {"counters", *(f"{i}/step" for i in range(len(params)))}:
        skipped = torch.zeros(found[name].numel(), dtype=torch.bool)
        if name[0] in "03":
            skipped[[1, 7]] = True
        now, old, other = (x[name].reshape(-1) for x in (found, before, undisturbed))
        assert torch.equal(now[skipped], old[skipped])
        assert torch.equal(now[~skipped], other[~skipped])
    run(optimizer, params, range(2, 4))
    assert optimizer.metrics()["grad/nonfinite"] == 4
    assert all(torch.isfinite(p).all() for p in params)


def test_posterior_of_a_huge_hessian_is_finite() -> None:
    """h is kept finite; sigma must be too where lambda h overflows fp32."""
    params = make_params([(2,)])
    optimizer = new(params)
    run(optimizer, params, range(1))
    optimizer.state[params[0]]["hess"].fill_(1e38)
    assert (optimizer.posterior(params[0]).stddev < 1e-18).all()


def test_banking_clears_gradients_in_place() -> None:
    """DDP's buckets are views: a gradient must never be rebound."""
    params = make_params()
    optimizer = new(params)
    with optimizer.sampled_params(train=True):
        quadratic(params).backward()
    grads = [p.grad for p in params]
    with optimizer.sampled_params(train=True):
        assert all(p.grad is g for p, g in zip(params, grads, strict=True))
        assert all(g is not None and not g.any() for g in grads)
