"""``max_step="auto"``: a twentieth of the scale at which a LoRA adapter's A is drawn, where its B starts at zero."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ivon_lora import IVON
from ivon_lora.step_bound import step_bound
from tests import replicated
from tests.two_processes import WORLD, Pool


def signs(size: float, *shape: int) -> Tensor:
    """A tensor whose elements are ``size`` or its negative: that is its root mean square."""
    generator = torch.Generator().manual_seed(0)
    return size * (2.0 * torch.randint(0, 2, shape, generator=generator) - 1.0)


def lora(size: float = 0.03, rank: int = 4) -> list[Tensor]:
    return [signs(size, rank, 20), torch.zeros(12, rank)]


def test_it_is_a_twentieth_of_the_median_of_the_matrices_that_are_drawn() -> None:
    assert step_bound(lora()) == 0.0015
    others = [signs(0.02, 4, 20), signs(0.1, 3, 12), signs(5.0, 40), torch.zeros(7)]  # vectors do not count
    assert step_bound([*lora(), *others]) == 0.0015
    assert step_bound([*lora(), signs(0.05, 2, 2)]) == 0.002  # halfway between two
    half = torch.zeros(8, 10)
    half[:4] = 0.04
    assert step_bound([half, torch.zeros(3, 8)]) == pytest.approx(0.05 * 0.04 / math.sqrt(2), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_any_dtype_and_two_digits(dtype: torch.dtype) -> None:
    """The squares of a large A are beyond fp16, and its root mean square is not."""
    for size, bound in ((0.0246, 0.0012), (300.0, 15.0)):
        assert step_bound([p.to(dtype) for p in lora(size)]) == bound


@pytest.mark.parametrize(
    "start",
    [
        lambda: [],
        lambda: [signs(0.03, 4, 20), signs(0.1, 12, 4)],  # training goes on
        lambda: [torch.zeros(3, 5), torch.zeros(5)],  # nothing has a scale
        lambda: [signs(0.02, 4, 20), signs(0.02, 12, 4), torch.zeros(4, 1)],  # AdaLoRA: E is a column
        lambda: [signs(1.0, 8), torch.zeros(8), torch.zeros(0, 3), signs(0.1, 3, 4)],
        lambda: [p.to("meta") for p in lora()],
    ],
    ids=["nothing", "trained", "zeros", "adalora", "vectors", "meta"],
)
def test_no_bound_where_nothing_starts_as_lora_does(start: Callable[[], list[Tensor]]) -> None:
    assert step_bound(start()) == math.inf


def test_it_falls_as_the_root_of_the_width() -> None:
    """PEFT draws A uniformly within 1 / sqrt(width): a root mean square of 1 / sqrt(3 width), here on 10^5 elements."""
    peft = pytest.importorskip("peft")
    bounds = []
    for width in (384, 4 * 384):
        model = peft.get_peft_model(nn.Sequential(nn.Linear(width, 8)), peft.LoraConfig(r=64, target_modules=["0"]))
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = IVON.from_adamw(params, lr=0.01, num_examples=10, batch_size=2)
        bounds.append(optimizer.param_groups[0]["max_step"])
        assert bounds[-1] == pytest.approx(0.05 / math.sqrt(3 * width), rel=0.04)  # rounding 3.5 %
    assert bounds == [0.0015, 0.00074]


def test_every_group_finds_its_own_and_later_ones_too() -> None:
    starts = [lora(), lora(0.1), [signs(1.0, 3, 3)]]
    groups: list[dict[str, Any]] = [{"params": [nn.Parameter(p) for p in start]} for start in starts]
    groups[1]["max_step"] = 0.25
    optimizer = IVON.from_adamw(groups, lr=0.01, num_examples=10, batch_size=2)
    assert [group["max_step"] for group in optimizer.param_groups] == [0.0015, 0.25, math.inf]
    optimizer.add_param_group({"params": [nn.Parameter(p) for p in lora(0.2)]})
    assert optimizer.param_groups[-1]["max_step"] == 0.01
    free = IVON([nn.Parameter(p) for p in lora()], 0.1, 10.0)
    assert free.param_groups[0]["max_step"] == math.inf
    free.add_param_group({"params": [nn.Parameter(p) for p in lora()], "max_step": "auto"})
    assert free.param_groups[-1]["max_step"] == 0.0015


def test_a_run_that_goes_on_keeps_the_bound_it_started_with() -> None:
    def optimizer() -> IVON:
        return IVON.from_adamw(params, lr=0.1, num_examples=10, batch_size=2)

    params = [nn.Parameter(p) for p in lora()]
    first = optimizer()
    for p in params:
        p.grad = torch.ones_like(p)
    before = params[1].detach().clone()
    first.train()
    first.step()
    # a gradient of 1 in every element: Adam's step would be 0.1; 0.0015 within the rounding of lr xi and of the sum
    torch.testing.assert_close(params[1].detach(), before - 0.0015, rtol=2.0**-21, atol=0.0)
    saved = copy.deepcopy(first.state_dict())
    resumed = optimizer()
    assert resumed.param_groups[0]["max_step"] == math.inf  # B is not zero any more
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["max_step"] == 0.0015


def test_a_word_that_is_not_auto_is_refused() -> None:
    params = [nn.Parameter(p) for p in lora()]
    for word in ("none", "AUTO"):
        with pytest.raises(ValueError, match=re.escape(f"max_step must be a number, got {word!r}")):
            IVON(params, 0.1, 10.0, max_step=word)
    with pytest.raises(ValueError, match="max_step must lie in"):
        IVON.from_adamw(params, num_examples=10, batch_size=2, max_step=0.0)


def test_shards_agree_with_the_whole(two_processes: Pool) -> None:
    """Cut unevenly, so that no process could know the bound from what it holds."""
    whole = replicated.bound_of(replicated.make_lora_start())
    assert 0.0 < whole < 1.0
    assert list(two_processes(replicated.bound_in_fsdp)) == [whole] * WORLD
