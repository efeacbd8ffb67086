"""``max_step``: no element of the mean moves further in a step, whatever the learning rate and its schedule."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ivon_lora import IVON
from tests.optimizer_problem import equal, make_params, photo, quadratic, same_photo, values

NEWTON: dict[str, Any] = {"lr": 0.1, "ess": 40.0, "beta2": 0.9, "weight_decay": 0.05, "hess_init": 0.8}
ADAM: dict[str, Any] = {"lr": 0.1, "num_examples": 64, "batch_size": 8, "backend": "eager"}


def step(optimizer: IVON, params: Sequence[Tensor], batch: int) -> None:
    optimizer.train()
    optimizer.zero_grad()
    quadratic(params, batch).backward()
    optimizer.step()


@pytest.mark.parametrize("backend", ["eager", "compile", "triton"])
def test_elements_that_would_go_further_go_as_far_as_it_says(backend: str) -> None:
    """From one state, a bounded and an unbounded step: lr' xi is rounded three times in fp32, so 2^-22 is allowed."""
    params, others = make_params(), make_params()
    options = ADAM | {"backend": backend}
    free = IVON.from_adamw(params, **options)
    step(free, params, 0)
    bounded = IVON.from_adamw(others, **options)
    bounded.load_state_dict(free.state_dict())
    with torch.no_grad():
        for p, q in zip(others, params, strict=True):
            p.copy_(q)
    start = torch.cat([p.detach().flatten() for p in params])
    step(free, params, 1)
    moved = (torch.cat([p.detach().flatten() for p in params]) - start).abs()
    bound = moved.median().item()
    for group in bounded.param_groups:
        group["max_step"] = bound
    step(bounded, others, 1)
    after, free_after = (torch.cat([p.detach().flatten() for p in ps]) for ps in (others, params))
    rounding = 2.0**-22 * (bound + start.abs())  # of the step, and of the weight it is added to
    assert ((after - start).abs() <= bound + rounding).all()
    short, long = moved < bound - rounding, moved > bound + rounding
    assert short.any()
    assert long.any()
    assert torch.equal(after[short], free_after[short])
    assert ((after - start).abs() >= bound - rounding)[long].all()


@pytest.mark.parametrize("rescale_lr", [True, False])
def test_it_is_a_clip_radius_that_follows_the_schedule(rescale_lr: bool) -> None:
    params, others = make_params(), make_params()
    a = IVON(params, rescale_lr=rescale_lr, max_step=1e-2, **NEWTON)
    b = IVON(others, rescale_lr=rescale_lr, **NEWTON)
    for n, lr in enumerate((0.1, 0.03, 0.2, 0.0)):
        for optimizer in (a, b):
            optimizer.param_groups[0]["lr"] = lr
        effective = lr * (NEWTON["hess_init"] + NEWTON["weight_decay"]) if rescale_lr else lr
        b.param_groups[0]["clip_radius"] = 1e-2 / effective if effective else math.inf
        before = values(params)
        step(a, params, n)
        step(b, others, n)
        assert equal(values(params), before) == (lr == 0)
        assert same_photo(photo(a), photo(b))


def test_the_smaller_of_the_two_bounds_holds() -> None:
    for radius, bound in ((0.02, math.inf), (0.02, 1.0), (math.inf, 0.002), (5.0, 0.002)):
        p = torch.zeros(3, requires_grad=True)
        optimizer = IVON(
            [p], 0.1, 10.0, clip_radius=radius, max_step=bound, weight_decay=0.0, rescale_lr=False, debias=False
        )
        p.grad = torch.full_like(p, 1e6)
        with pytest.warns(UserWarning, match="without a posterior sample"):
            optimizer.step()
        torch.testing.assert_close(p.detach(), torch.full_like(p, -0.002), rtol=2.0**-22, atol=0.0)


def test_groups_have_their_own_and_checkpoints_of_earlier_versions_none() -> None:
    p, q = make_params([(3,), (2,)])
    groups: list[dict[str, Any]] = [{"params": [p], "max_step": 0.5}, {"params": [q]}]
    optimizer = IVON.from_adamw(groups, num_examples=10, batch_size=2, max_step=0.25)
    assert [group["max_step"] for group in optimizer.param_groups] == [0.5, 0.25]
    saved = copy.deepcopy(optimizer.state_dict())
    other = IVON.from_adamw([{"params": [p]}, {"params": [q]}], num_examples=10, batch_size=2)
    other.load_state_dict(saved)
    assert [group["max_step"] for group in other.param_groups] == [0.5, 0.25]
    for group in saved["param_groups"]:
        del group["max_step"]
    other.load_state_dict(saved)
    assert [group["max_step"] for group in other.param_groups] == [math.inf] * 2
