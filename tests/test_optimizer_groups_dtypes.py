"""Groups with their own hyperparameters; shapes, layouts and dtypes of parameters; independence of packing."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ivon_lora import IVON
from tests.compiler import BACKENDS
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
)


def test_every_group_has_its_own_hyperparameters_which_may_change_between_steps() -> None:
    params = make_params([(5,), (3, 2), (4,), ()])
    special: list[dict[str, Any]] = [
        {},
        {"lr": 0.02, "ess": 500.0, "hess_init": 0.5, "beta1": 0.5, "beta2": 0.9, "weight_decay": 0.1},
        {"hess_approx": "gradsq", "debias": False, "rescale_lr": False, "clip_radius": 0.3, "lr": 0.05},
        {"beta1": 0.0, "weight_decay": 0.0, "beta2": 0.5},
    ]
    groups = [{"params": [p], **s} for p, s in zip(params, special, strict=True)]
    optimizer = IVON(groups, **HYPER)
    oracle = Oracle(params, [{**HYPER, **s} for s in special])
    for batch in range(20):
        if batch >= 12:
            change = {"ess": 50.0 * batch, "weight_decay": 0.01 * (batch - 12), "beta2": 0.9, "lr": 1.0 / batch}
            optimizer.param_groups[0].update(change)
            vars(oracle.each[0]).update(change)
        train_step(optimizer, params, batch)
        oracle.train_step(batch)
        oracle.check(optimizer, params)
        for i, p in enumerate(params):
            np.testing.assert_allclose(optimizer.posterior(p).stddev.numpy(), oracle.each[i].sigma, rtol=1e-5)


@pytest.mark.parametrize("sampled", [False, True])
def test_add_param_group(sampled: bool) -> None:
    """What is added while there is a sample takes part from the next ``train`` on."""
    first, second = make_params([(5,), (3,)]), make_params([(4,), (2, 2)], seed=1)
    params = [*first, *second]
    optimizer = new(first)
    oracle = Oracle(params, [HYPER, HYPER, {**HYPER, "lr": 0.05}, {**HYPER, "lr": 0.05}])
    for batch in range(2):
        train_step(optimizer, first, batch)
        oracle.step([[*[gradient(oracle.theta(i), i, batch) for i in range(2)], None, None]])
    optimizer.zero_grad()
    if sampled:
        optimizer.train()
    optimizer.add_param_group({"params": second, "lr": 0.05})
    assert optimizer.param_groups[1]["completed_steps"] == 2
    train_step(optimizer, params, 2)
    oracle.train_step(2)
    oracle.check(optimizer, params)
    run(optimizer, params, range(3, 6))
    assert [optimizer.state[p]["step"].item() for p in params] == [6.0, 6.0, 4.0, 4.0]
    assert [len(g["params"]) for g in optimizer.state_dict()["param_groups"]] == [2, 2]


def test_maximize_may_differ_between_groups_and_is_remembered() -> None:
    """f(x, y) = x^2 - y^2 has its saddle at 0: x descends to it, y climbs."""
    x, y = nn.Parameter(torch.tensor([2.0])), nn.Parameter(torch.tensor([-3.0]))
    groups: list[dict[str, Any]] = [{"params": [x]}, {"params": [y], "maximize": True}]
    optimizer = IVON(groups, lr=0.5, ess=1e6, hess_init=2.0, weight_decay=1e-6, rescale_lr=False)
    for _ in range(200):
        optimizer.train()
        optimizer.zero_grad()
        (x.square() - y.square()).sum().backward()
        optimizer.step()
    for p in (x, y):  # the curvature of what is minimised, 2, is positive in both: Price's estimate has its sign
        assert p.item() == pytest.approx(0.0, abs=1e-2)
        assert optimizer.state[p]["hess"].item() == pytest.approx(2.0, rel=0.1)
    saved = optimizer.state_dict()
    other = IVON([{"params": [x]}, {"params": [y]}], lr=0.1, ess=10)
    other.load_state_dict(saved)
    assert [group["maximize"] for group in other.param_groups] == [False, True]
    del saved["param_groups"][1]["maximize"]  # as version 0.1.0 saved it
    other.load_state_dict(saved)
    assert other.param_groups[1]["maximize"] is False


ODD_SHAPES: list[tuple[int, ...]] = [(), (1,), (0,), (3, 0, 2), (2,), (3,), (5,), (2, 3, 5, 7), (1, 1, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_odd_shapes(dtype: torch.dtype) -> None:
    params = make_params(ODD_SHAPES, dtype)
    optimizer, oracle = new(params), Oracle(params, HYPER)
    for batch in range(4):
        train_step(optimizer, params, batch)
        if dtype in (torch.float32, torch.float64):
            oracle.train_step(batch)
            oracle.check(optimizer, params)
    for p in params:
        readings = [optimizer.posterior(p).mean, optimizer.posterior(p).stddev]
        readings += [optimizer.snr(p, criterion) for criterion in ("snr", "snr_abs", "magnitude", "inverse_std")]
        assert all(x.shape == p.shape and x.isfinite().all() for x in readings)
        assert optimizer.state[p]["step"].item() == 4.0
    assert all(np.isfinite(v) for v in optimizer.metrics().values())
    for _ in range(2):
        with optimizer.sampled_params(train=True):
            quadratic(params).backward()
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in params)


Layout = Callable[[Tensor], Tensor]
LAYOUTS: dict[str, Layout] = {
    "transposed": lambda t: t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim()))),
    "channels_last": lambda t: (
        t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t.t().contiguous().t()
    ),
    "strided": lambda t: torch.stack([t, t], dim=-1)[..., 0],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
@pytest.mark.parametrize("what", ["parameters", "gradients", "both"])
def test_layout_does_not_matter(layout: Layout, what: str, dtype: torch.dtype, backend: str) -> None:
    """Nor do the strides of dimensions of one element."""
    plain = make_params([(4, 6), (3, 4, 5, 5), (1,), (4, 1), (1, 3)], dtype)
    laid = [nn.Parameter(p.detach().clone() if what == "gradients" else layout(p.detach().clone())) for p in plain]
    assert what == "gradients" or not any(p.is_contiguous() for p in laid[:2])
    places = [(p.stride(), p.data_ptr()) for p in laid]
    first, second = new(plain, backend=backend), new(laid, backend=backend)
    for batch in range(4):
        for optimizer, params in ((first, plain), (second, laid)):
            for _ in range(1 + batch % 2):
                with optimizer.sampled_params(train=True):
                    for i, p in enumerate(params):
                        grad = torch.from_numpy(gradient(p.detach().double().contiguous().numpy(), i, batch)).to(dtype)
                        p.grad = layout(grad) if optimizer is second and what != "parameters" else grad
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
    assert differing(photo(first), photo(second)) == []
    with first.sampled_params(), second.sampled_params():
        assert equal(plain, laid)
    assert [(p.stride(), p.data_ptr()) for p in laid] == places


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_mean_learns_what_16_bits_cannot_hold(dtype: torch.dtype) -> None:
    """Updates far below the parameter's resolution add up in the fp32 mean; the Hessian's do too."""
    p = nn.Parameter(torch.ones(64, dtype=dtype))
    hyper: dict[str, Any] = {"lr": 1e-5, "ess": 1e4, "weight_decay": 0.0, "beta2": 0.9999}
    optimizer, oracle = IVON([p], **hyper), Oracle([p], hyper)
    for _ in range(30):
        optimizer.train()
        p.grad = torch.ones_like(p)
        optimizer.step()
        oracle.step([[np.ones(64)]])
    np.testing.assert_allclose(optimizer.posterior(p).mean.numpy(), oracle.each[0].mean, rtol=1e-6)
    assert (optimizer.posterior(p).mean < 1.0).all()
    np.testing.assert_allclose(optimizer.state[p]["hess"].numpy(), oracle.each[0].hess, rtol=1e-5)
    assert (optimizer.state[p]["hess"] != 1.0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_sample_is_the_rounded_fp32_sample(dtype: torch.dtype) -> None:
    params = make_params(dtype=dtype)
    wide = [nn.Parameter(p.detach().float()) for p in params]
    optimizer, reference = new(params), new(wide)
    optimizer.train()
    reference.train()
    assert equal(params, [w.detach().to(dtype) for w in wide])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_depend_on_the_index_of_a_parameter_and_not_on_its_neighbours(dtype: torch.dtype, backend: str) -> None:
    ends = []
    for shapes in ([(3,), (37, 11), (2,)], [(40000,), (37, 11), (5, 5)], [(1,), (37, 11)], [(0,), (37, 11), (70000,)]):
        params = make_params(shapes, dtype)
        with torch.no_grad():
            params[1].copy_(make_params([(37, 11)], dtype, seed=5)[0])
        optimizer = new(params, backend=backend)
        run(optimizer, params, range(3))
        ends.append([params[1], *optimizer.state[params[1]].values()])
    assert all(equal(ends[0], end) for end in ends[1:])
    first, second = params = [nn.Parameter(torch.zeros(6, dtype=dtype)) for _ in range(2)]
    optimizer = new(params, backend=backend)
    optimizer.train()
    assert not torch.equal(first, second)
