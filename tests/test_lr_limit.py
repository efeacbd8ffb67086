"""``VAdam(lr_limit="auto")``: a step takes at most 0.064 / sqrt(inputs) where B starts at zero, as LoRA's does."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ivon_lora import IVON, VAdam
from ivon_lora.optim.lr_limit import lr_limit
from tests import replicated
from tests.optimizer_problem import equal, run, values
from tests.two_processes import WORLD, Pool

COUNT: dict[str, Any] = {"num_examples": 10, "batch_size": 2}


def drawn(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


def zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


def lora(inputs: int = 64, rank: int = 4) -> list[nn.Parameter]:
    """A and B; the limit is 0.064 / 8 = 0.008 for 64 inputs."""
    return [drawn(rank, inputs), zeros(12, rank)]


def test_it_follows_the_median_number_of_inputs_of_the_matrices_that_are_drawn() -> None:
    assert lr_limit(lora()) == 0.008
    others = [drawn(3, 9), drawn(3, 999), drawn(40), zeros(7), zeros(4, 4)]  # vectors do not count, nor do zeros
    assert lr_limit([*lora(), *others]) == 0.008
    frozen = [drawn(5, 5).requires_grad_(False) for _ in range(9)]
    assert lr_limit([*lora(), *frozen]) == 0.008
    assert lr_limit([*lora(), drawn(2, 448)]) == 0.004  # halfway between 64 and 448: 256 inputs
    assert lr_limit([drawn(4, 16, 2, 2), zeros(8, 4, 1, 1)]) == 0.008  # a convolution of 16 channels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_it_does_not_depend_on_dtype_or_scale(dtype: torch.dtype, scale: float) -> None:
    """The squares of the smallest and largest elements are beyond fp16."""
    assert lr_limit([nn.Parameter((scale * p.detach()).to(dtype)) for p in lora()]) == 0.008


@pytest.mark.parametrize(
    "start",
    [
        [],
        [drawn(4, 20), drawn(12, 4)],  # training goes on
        [zeros(3, 5), zeros(5)],  # nothing is drawn
        [drawn(4, 20), drawn(12, 4), zeros(4, 1)],  # AdaLoRA: E is a column
        [drawn(8), zeros(8), zeros(0, 3), drawn(3, 4)],
        [nn.Parameter(p.detach().to("meta")) for p in lora()],
    ],
    ids=["nothing", "trained", "zeros", "adalora", "vectors", "meta"],
)
def test_no_limit_where_nothing_starts_as_lora_does(start: list[Tensor]) -> None:
    assert lr_limit(start) == math.inf


def test_shards_agree_with_the_whole(two_processes: Pool) -> None:
    """Cut unevenly, so that no process could know the limit from what it holds."""
    whole = lr_limit(replicated.make_lora_start().parameters())
    assert 0.0 < whole < 1.0
    assert list(two_processes(replicated.limit_in_fsdp)) == [whole] * WORLD


def named() -> Any:
    return zip(("A", "B"), lora(), strict=True)


@pytest.mark.parametrize(
    "params",
    [lora, lambda: iter(lora()), named, lambda: [{"params": named()}], lambda: [{"params": iter(lora())}]],
    ids=["tensors", "iterator", "named", "named group", "group"],
)
def test_a_step_takes_no_more_and_says_so_once(params: Callable[[], Any], caplog: pytest.LogCaptureFixture) -> None:
    """The group's learning rate stays what the user said: a schedule runs on it, and a log shows it."""
    ends = []
    for lr, limit in ((0.008, None), (0.1, "auto"), (0.1, 0.008), (torch.tensor(0.1), "auto")):
        caplog.clear()
        optimizer = VAdam(params(), lr, lr_limit=limit, **COUNT)
        (group,) = optimizer.param_groups
        run(optimizer, group["params"], range(3))
        ends.append(values(group["params"]))
        assert group["lr"] is lr
        assert float(lr) == pytest.approx(0.1 if limit else 0.008)
        assert caplog.text.count("lr=0.1 is lowered to 0.008") == (limit is not None) == len(caplog.records)
    assert all(equal(ends[0], end) for end in ends[1:])


def test_schedules_are_followed_below_it(caplog: pytest.LogCaptureFixture) -> None:
    params, others = lora(), lora()
    optimizer, by_hand = VAdam(params, lr=0.02, **COUNT), VAdam(others, lr=0.02, lr_limit=None, **COUNT)
    by_hand.param_groups[0]["ess"] = optimizer.param_groups[0]["ess"]
    rates = [0.02 / 8, 0.02, 0.02 / 2, 0.02, 0.02 / 4]
    for step, lr in enumerate(rates):
        if step <= 2:  # the limit is for the rate of a step, not for that of the constructor, which a schedule replaces
            assert caplog.text.count("is lowered") == (step == 2)
        if step == 2:
            params, optimizer = copy.deepcopy((params, optimizer))
        elif step == 3:
            resumed = VAdam(params, lr=0.02, **COUNT)
            assert resumed.param_groups[0]["lr_limit"] == math.inf
            resumed.load_state_dict(optimizer.state_dict())
            optimizer = resumed
        optimizer.param_groups[0]["lr"], by_hand.param_groups[0]["lr"] = lr, min(lr, 0.008)
        run(optimizer, params, [step])
        run(by_hand, others, [step])
        assert equal(params, others)


def test_every_group_has_its_own() -> None:
    groups: list[dict[str, Any]] = [
        {"params": lora()},
        {"params": lora(16), "lr": 0.05},
        {"params": lora(16), "lr_limit": None},
        {"params": lora(16), "lr_limit": 0.5},
        {"params": [drawn(3, 3)]},
        {"params": drawn(4, 20)},
    ]
    before = [dict(group) for group in groups]
    optimizer = VAdam(groups, lr=0.01, **COUNT)
    optimizer.add_param_group({"params": lora(256)})
    limits = [group["lr_limit"] for group in optimizer.param_groups]
    assert limits == [0.008, 0.016, math.inf, 0.5, math.inf, math.inf, 0.004]
    assert groups == before  # the caller's
    assert IVON(lora(), 0.1, 10.0).param_groups[0]["lr_limit"] == math.inf


def test_the_noise_is_that_of_the_learning_rate_that_is_left() -> None:
    a, b, c = (VAdam(lora(4096), lr, **COUNT).param_groups[0]["ess"] for lr in (0.1, 0.001, 0.0005))
    assert a == b == pytest.approx(10 / 0.006 * 9)
    assert c == pytest.approx(4 * b)
