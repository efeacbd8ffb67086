"""``lr_limit``: no step with a larger learning rate; "auto" is a tenth of the scale at which LoRA's A is drawn."""

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
from ivon_lora.lr_limit import limit_of
from tests import replicated
from tests.optimizer_problem import make_params, photo, quadratic, same_photo
from tests.two_processes import WORLD, Pool

NEWTON: dict[str, Any] = {"ess": 40.0, "beta2": 0.9, "weight_decay": 0.05, "hess_init": 0.8}
ADAM: dict[str, Any] = {"ess": 40.0, "batch_size": 8, "hess_init": "auto", "hess_approx": "fisher", "step_rule": "adam"}


def signs(size: float, *shape: int) -> Tensor:
    """A tensor whose elements are ``size`` or its negative: that is its root mean square."""
    generator = torch.Generator().manual_seed(0)
    return size * (2.0 * torch.randint(0, 2, shape, generator=generator) - 1.0)


def lora(size: float = 0.03, rank: int = 4) -> list[Tensor]:
    return [signs(size, rank, 20), torch.zeros(12, rank)]


@pytest.mark.parametrize("backend", ["eager", "compile", "triton"])
@pytest.mark.parametrize("options", [ADAM, NEWTON], ids=["adam", "newton"])
def test_a_run_beyond_the_limit_is_one_with_the_schedule_cut_off(options: dict[str, Any], backend: str) -> None:
    params, others = make_params(), make_params()
    optimizer = IVON(params, lr=0.1, lr_limit=0.04, backend=backend, **options)
    other = IVON(others, lr=0.1, backend=backend, **options)
    for n, lr in enumerate((0.1, 0.16, 0.02, 0.04)):
        optimizer.param_groups[0]["lr"], other.param_groups[0]["lr"] = lr, min(lr, 0.04)
        for each, tensors in ((optimizer, params), (other, others)):
            each.train()
            each.zero_grad()
            quadratic(tensors, n).backward()
            each.step()
        assert same_photo(photo(optimizer), photo(other))
        assert optimizer.param_groups[0]["lr"] == lr  # which schedulers read


# ---------------------------------------------------------------- "auto"


def test_it_is_a_tenth_of_the_median_of_the_matrices_that_are_drawn() -> None:
    assert limit_of(lora()) == 0.003
    others = [signs(0.02, 4, 20), signs(0.1, 3, 12), signs(5.0, 40), torch.zeros(7)]  # vectors do not count
    assert limit_of([*lora(), *others]) == 0.003
    assert limit_of([*lora(), signs(0.06, 2, 2)]) == 0.0045  # halfway between two
    half = torch.zeros(8, 10)
    half[:4] = 0.04
    assert limit_of([half, torch.zeros(3, 8)]) == pytest.approx(0.04 / math.sqrt(2) / 10, rel=0.005)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_any_dtype_and_two_digits(dtype: torch.dtype) -> None:
    """The squares of a large A are beyond fp16, and its root mean square is not."""
    for size, limit in ((0.02466, 0.00247), (320.0, 32.0)):
        assert limit_of([p.to(dtype) for p in lora(size)]) == limit


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
def test_no_limit_where_nothing_starts_as_lora_does(start: Callable[[], list[Tensor]]) -> None:
    assert limit_of(start()) == math.inf


def test_it_falls_as_the_root_of_the_width() -> None:
    """PEFT draws A uniformly within 1 / sqrt(width): a root mean square of 1 / sqrt(3 width), here on 10^5 elements."""
    peft = pytest.importorskip("peft")
    limits = []
    for width in (384, 4 * 384):
        model = peft.get_peft_model(nn.Sequential(nn.Linear(width, 8)), peft.LoraConfig(r=64, target_modules=["0"]))
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = IVON.from_adamw(params, lr=0.01, num_examples=10, batch_size=2)
        limits.append(optimizer.param_groups[0]["lr_limit"])
        assert limits[-1] == pytest.approx(0.1 / math.sqrt(3 * width), rel=0.01)  # three digits of it, and chance


def test_every_group_finds_its_own_and_later_ones_too() -> None:
    starts = [lora(), lora(0.1), [signs(1.0, 3, 3)]]
    groups: list[dict[str, Any]] = [{"params": [nn.Parameter(p) for p in start]} for start in starts]
    groups[1]["lr_limit"] = 0.25
    optimizer = IVON.from_adamw(groups, lr=0.01, num_examples=10, batch_size=2)
    assert [group["lr_limit"] for group in optimizer.param_groups] == [0.003, 0.25, math.inf]
    optimizer.add_param_group({"params": [nn.Parameter(p) for p in lora(0.2)]})
    assert optimizer.param_groups[-1]["lr_limit"] == 0.02
    free = IVON([nn.Parameter(p) for p in lora()], 0.1, 10.0)
    assert free.param_groups[0]["lr_limit"] == math.inf
    free.add_param_group({"params": [nn.Parameter(p) for p in lora()], "lr_limit": "auto"})
    assert free.param_groups[-1]["lr_limit"] == 0.003


def test_a_run_that_goes_on_keeps_the_limit_it_started_with() -> None:
    def optimizer() -> IVON:
        return IVON.from_adamw(params, lr=0.04, num_examples=10, batch_size=2)

    params = [nn.Parameter(p) for p in lora(0.1)]
    first = optimizer()
    for p in params:
        p.grad = torch.ones_like(p)
    before = params[1].detach().clone()
    first.train()
    first.step()
    # a gradient of 1 everywhere: Adam's step is lr, which is 0.01 here; some roundings of the state to fp32
    torch.testing.assert_close(params[1].detach(), before - 0.01, rtol=1e-5, atol=0.0)
    saved = copy.deepcopy(first.state_dict())
    resumed = optimizer()
    assert resumed.param_groups[0]["lr_limit"] == math.inf  # B is not zero any more
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["lr_limit"] == 0.01
    for group in saved["param_groups"]:
        del group["lr_limit"]  # of an earlier version, which had none
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["lr_limit"] == math.inf


def test_a_learning_rate_beyond_it_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    for lr, limit in ((0.0032, "auto"), (0.1, 0.01), (0.1, math.inf)):
        IVON.from_adamw([nn.Parameter(p) for p in lora()], lr, num_examples=10, batch_size=2, lr_limit=limit)
    assert caplog.text == ""
    IVON.from_adamw([nn.Parameter(p) for p in lora()], torch.tensor(0.1), num_examples=10, batch_size=2)
    assert "lr=0.1 is large for this adapter: steps are taken with at most lr_limit=0.003" in caplog.text


def test_a_word_that_is_not_auto_is_refused() -> None:
    params = [nn.Parameter(p) for p in lora()]
    for word in ("none", "AUTO"):
        with pytest.raises(ValueError, match=re.escape(f"lr_limit must be a number, got {word!r}")):
            IVON(params, 0.1, 10.0, lr_limit=word)
    with pytest.raises(ValueError, match="lr_limit must lie in"):
        IVON.from_adamw(params, num_examples=10, batch_size=2, lr_limit=0.0)


def test_shards_agree_with_the_whole(two_processes: Pool) -> None:
    """Cut unevenly, so that no process could know the limit from what it holds."""
    whole = replicated.limit_of(replicated.make_lora_start())
    assert 0.0 < whole < 1.0
    assert list(two_processes(replicated.limit_in_fsdp)) == [whole] * WORLD
