"""``maximize=True``: the bits of minimising the negative. (Triton's are eager's: test_triton_lockstep.)"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ivon_lora import IVON, LoraAdapter, RankPruner, VAdam
from tests.compiler import BACKENDS
from tests.optimizer_problem import make_params, photo, quadratic, same_photo

HYPER: dict[str, Any] = {"ess": 40.0, "beta2": 0.9, "weight_decay": 0.05, "hess_init": 0.8, "clip_radius": 2.0}

Objective = Callable[[Sequence[Tensor], int], Tensor]


def negative(params: Sequence[Tensor], batch: int = 0) -> Tensor:
    return -quadratic(params, batch)


def trained(backend: str, dtype: torch.dtype, objective: Objective, maximize: bool, **options: Any) -> dict[str, Any]:
    """Four steps, every other one from two samples, in which two of four ranks are pruned."""
    a, b, other = make_params([(4, 6), (5, 4), (7,)], dtype)
    criterion = options.pop("criterion", "snr_abs")
    pruner = RankPruner([LoraAdapter("x", a, b)], 2, criterion, total_steps=4, warmup=1, final=1, interval=1)
    make: Any = VAdam if "num_examples" in options else functools.partial(IVON, **HYPER)
    optimizer = make([a, b, other], lr=0.1, backend=backend, pruner=pruner, maximize=maximize, **options)
    for batch in range(4):
        for sample in range(1 + batch % 2):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                objective([a, b, other], batch + sample).backward()
        optimizer.step()
    assert int(optimizer.state[a]["rank_mask"].sum()) == 2
    return photo(optimizer)


@pytest.mark.parametrize(
    "options",
    [{"criterion": "sensitivity"}, {"hess_approx": "gradsq"}, {"num_examples": 40, "batch_size": 4}],
    ids=["price", "gradsq", "vadam"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_maximising_the_negative_is_minimising(backend: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    least = trained(backend, dtype, quadratic, False, **options)
    assert same_photo(least, trained(backend, dtype, negative, True, **options))
    assert not same_photo(least, trained(backend, dtype, negative, False, **options))


def test_groups_may_differ_and_state_dicts_remember_it() -> None:
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
