"""``maximize=True``: the bits of minimising the negative, in every backend and with every estimate of the curvature."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ivon_lora import IVON, LoraAdapter, RankPruner, VAdam
from tests.optimizer_problem import make_params, photo, quadratic, same_photo

#: backend, dtype and samples per step; the interpreter that runs Triton's kernels here is slow
CASES = [(b, d, n) for b in ("eager", "compile") for d in (torch.float32, torch.bfloat16) for n in (0, 2)]
CASES += [("eager", torch.float64, 0), ("triton", torch.float32, 0), ("triton", torch.float32, 2)]
HYPER: dict[str, Any] = {"ess": 40.0, "beta2": 0.9, "weight_decay": 0.05, "hess_init": 0.8, "clip_radius": 2.0}

Objective = Callable[[Sequence[Tensor], int], Tensor]


def negative(params: Sequence[Tensor], batch: int = 0) -> Tensor:
    return -quadratic(params, batch)


def step(optimizer: IVON, params: Sequence[Tensor], objective: Objective, batch: int, samples: int) -> None:
    """One step from several samples, all but the last of which are banked; or from one that `train` draws."""
    for sample in range(samples):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            objective(params, batch + sample).backward()
    if not samples:
        optimizer.train()
        optimizer.zero_grad()
        objective(params, batch).backward()
    optimizer.step()


def trained(backend: str, dtype: torch.dtype, objective: Objective, samples: int, **options: Any) -> dict[str, Any]:
    params = make_params([(3, 5), (7,)], dtype)
    make: Any = VAdam if "num_examples" in options else functools.partial(IVON, **HYPER)
    optimizer = make(params, lr=0.1, backend=backend, **options)
    for batch in range(2):
        step(optimizer, params, objective, batch, samples)
    optimizer.eval()
    return photo(optimizer)


@pytest.mark.parametrize(
    "options",
    [
        {"hess_approx": "price"},
        {"hess_approx": "gradsq"},
        {"num_examples": 40, "batch_size": 4},
    ],
    ids=["price", "gradsq", "vadam"],
)
@pytest.mark.parametrize(("backend", "dtype", "samples"), CASES)
def test_maximising_the_negative_is_minimising(
    backend: str, dtype: torch.dtype, samples: int, options: dict[str, Any]
) -> None:
    least = trained(backend, dtype, quadratic, samples, **options)
    most = trained(backend, dtype, negative, samples, maximize=True, **options)
    assert same_photo(least, most)
    wrong_way = trained(backend, dtype, negative, samples, **options)
    assert not same_photo(least, wrong_way)


@pytest.mark.parametrize(
    ("backend", "criterion"), [("eager", "snr_abs"), ("eager", "sensitivity"), ("triton", "snr_abs")]
)
def test_ranks_that_survive_are_the_same(backend: str, criterion: str) -> None:
    ends = []
    for objective, maximize in ((quadratic, False), (negative, True)):
        A, B = make_params([(4, 6), (5, 4)])
        pruner = RankPruner([LoraAdapter("a", A, B)], 2, criterion, total_steps=4, warmup=1, final=1, interval=1)
        optimizer = IVON([A, B], lr=0.1, backend=backend, pruner=pruner, maximize=maximize, **HYPER)
        for batch in range(4):
            step(optimizer, [A, B], objective, batch, 0)
        optimizer.eval()
        assert int(optimizer.state[A]["rank_mask"].sum()) == 2
        ends.append(photo(optimizer))
    assert same_photo(*ends)


def test_groups_may_differ() -> None:
    """f(x, y) = x^2 - y^2 has its saddle at 0: x descends to it, y climbs."""
    x, y = nn.Parameter(torch.tensor([2.0])), nn.Parameter(torch.tensor([-3.0]))
    groups: list[dict[str, Any]] = [{"params": [x]}, {"params": [y], "maximize": True}]
    optimizer = IVON(groups, lr=0.5, ess=1e6, hess_init=2.0, weight_decay=1e-6, rescale_lr=False)
    for _ in range(200):
        optimizer.train()
        optimizer.zero_grad()
        (x.square() - y.square()).sum().backward()
        optimizer.step()
    assert x.item() == pytest.approx(0.0, abs=1e-2)
    assert y.item() == pytest.approx(0.0, abs=1e-2)
    for p in (x, y):  # the curvature of what is minimised, 2, is positive in both: Price's estimate has its sign
        assert optimizer.state[p]["hess"].item() == pytest.approx(2.0, rel=0.1)


def test_state_dicts_remember_it_and_those_without_it_minimise() -> None:
    params, others = make_params(), make_params()
    optimizer = IVON(params, lr=0.1, maximize=True, **HYPER)
    step(optimizer, params, negative, 0, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["param_groups"][0]["maximize"] is True
    other = IVON(others, lr=0.1, **HYPER)
    other.load_state_dict(saved)
    with torch.no_grad():
        for p, q in zip(others, params, strict=True):
            p.copy_(q)
    step(optimizer, params, negative, 1, 1)
    step(other, others, negative, 1, 1)
    assert same_photo(photo(optimizer), photo(other))
    for group in saved["param_groups"]:
        del group["maximize"]  # as an earlier version saved it
    other.load_state_dict(saved)
    assert other.param_groups[0]["maximize"] is False
