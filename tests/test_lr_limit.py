"""``from_adamw(lr_limit="auto")``: at most a ninth of the scale at which LoRA's A is drawn, where B starts at zero."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ivon_lora import IVON
from ivon_lora.finetune.methods import make_method
from ivon_lora.finetune.settings import make_settings
from ivon_lora.lr_limit import lr_limit
from tests import replicated
from tests.two_processes import WORLD, Pool

COUNT: dict[str, Any] = {"num_examples": 10, "batch_size": 2}


def signs(size: float, *shape: int) -> Tensor:
    """A parameter whose elements are ``size`` or its negative: that is its root mean square."""
    generator = torch.Generator().manual_seed(0)
    return nn.Parameter(size * (2.0 * torch.randint(0, 2, shape, generator=generator) - 1.0))


def zeros(*shape: int) -> Tensor:
    return nn.Parameter(torch.zeros(shape))


def lora(size: float = 0.03, rank: int = 4) -> list[Tensor]:
    return [signs(size, rank, 20), zeros(12, rank)]


# ---------------------------------------------------------------- the limit


def test_it_is_a_ninth_of_the_median_of_the_matrices_that_are_drawn() -> None:
    assert lr_limit(lora()) == 0.0033
    others = [signs(0.02, 4, 20), signs(0.1, 3, 12), signs(5.0, 40), zeros(7)]  # vectors do not count
    assert lr_limit([*lora(), *others]) == 0.0033
    frozen = [signs(7.0, 5, 5).requires_grad_(False) for _ in range(9)]
    assert lr_limit([*lora(), *frozen]) == 0.0033
    assert lr_limit([*lora(), signs(0.06, 2, 2)]) == 0.005  # halfway between two
    half = torch.zeros(8, 10)
    half[:4] = 0.04
    assert lr_limit([nn.Parameter(half), zeros(3, 8)]) == pytest.approx(0.04 / math.sqrt(2) / 9, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_any_dtype_and_two_digits(dtype: torch.dtype) -> None:
    """The squares of a large A are beyond fp16, and its root mean square is not."""
    for size, limit in ((0.0246, 0.0027), (288.0, 32.0)):
        assert lr_limit([nn.Parameter(p.detach().to(dtype)) for p in lora(size)]) == limit


@pytest.mark.parametrize(
    "start",
    [
        lambda: [],
        lambda: [signs(0.03, 4, 20), signs(0.1, 12, 4)],  # training goes on
        lambda: [zeros(3, 5), zeros(5)],  # nothing has a scale
        lambda: [signs(0.02, 4, 20), signs(0.02, 12, 4), zeros(4, 1)],  # AdaLoRA: E is a column
        lambda: [signs(1.0, 8), zeros(8), zeros(0, 3), signs(0.1, 3, 4)],
        lambda: [nn.Parameter(p.detach().to("meta")) for p in lora()],
    ],
    ids=["nothing", "trained", "zeros", "adalora", "vectors", "meta"],
)
def test_no_limit_where_nothing_starts_as_lora_does(start: Callable[[], list[Tensor]]) -> None:
    assert lr_limit(start()) == math.inf


def test_it_falls_as_the_root_of_the_width() -> None:
    """PEFT draws A uniformly within 1 / sqrt(width): a root mean square of 1 / sqrt(3 width), here on 10^4 elements."""
    peft = pytest.importorskip("peft")
    for width, limit in ((384, 0.0033), (4 * 384, 0.0016)):
        model = peft.get_peft_model(nn.Sequential(nn.Linear(width, 8)), peft.LoraConfig(r=64, target_modules=["0"]))
        optimizer = IVON.from_adamw(model.parameters(), lr=0.01, **COUNT)  # with the frozen layer
        assert optimizer.param_groups[0]["lr"] == limit == pytest.approx(1 / 9 / math.sqrt(3 * width), rel=0.03)


def test_shards_agree_with_the_whole(two_processes: Pool) -> None:
    """Cut unevenly, so that no process could know the limit from what it holds."""
    whole = lr_limit(replicated.make_lora_start().parameters())
    assert 0.0 < whole < 1.0
    assert list(two_processes(replicated.limit_in_fsdp)) == [whole] * WORLD


# ---------------------------------------------------------------- what is lowered to it


def named() -> Any:
    return zip(("A", "B"), lora(), strict=True)


@pytest.mark.parametrize(
    "params",
    [lora, lambda: iter(lora()), named, lambda: [{"params": named()}], lambda: [{"params": iter(lora())}]],
    ids=["tensors", "iterator", "named", "named group", "group"],
)
def test_a_learning_rate_beyond_it_is_lowered_with_a_warning(
    params: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    for lr, taken in ((0.0033, 0.0033), (1e-4, 1e-4), (0.1, 0.0033)):
        assert caplog.text == ""
        (group,) = IVON.from_adamw(params(), lr, **COUNT).param_groups
        assert (group["lr"], len(group["params"])) == (taken, 2)
    assert "lr=0.1 is lowered to 0.0033" in caplog.text


def test_the_type_of_a_learning_rate_stays_and_none_keeps_it() -> None:
    tensor = torch.tensor(0.1, dtype=torch.float64)
    lowered = IVON.from_adamw(lora(), tensor, **COUNT).param_groups[0]["lr"]
    assert isinstance(lowered, Tensor)
    assert (lowered.dtype, lowered.item(), tensor.item()) == (torch.float64, 0.0033, 0.1)
    assert IVON.from_adamw(lora(), 0.1, lr_limit=None, **COUNT).param_groups[0]["lr"] == 0.1
    assert IVON(lora(), 0.1, 10.0).param_groups[0]["lr"] == 0.1


def test_every_group_has_its_own() -> None:
    groups: list[dict[str, Any]] = [
        {"params": lora()},
        {"params": lora(0.1), "lr": 0.05},
        {"params": lora(0.1), "lr": 0.002},
    ]
    groups += [{"params": [signs(1.0, 3, 3)]}, {"params": signs(0.03, 4, 20)}]
    before = [dict(group) for group in groups]
    optimizer = IVON.from_adamw(groups, lr=0.01, **COUNT)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0033, 0.011, 0.002, 0.01, 0.01]
    assert groups == before  # the caller's


def test_the_noise_is_that_of_the_lowered_learning_rate() -> None:
    """A limit below 3e-3 brings less noise, as a small learning rate does."""
    a, b = (IVON.from_adamw(lora(0.009), lr, **COUNT) for lr in (0.1, 0.001))
    assert a.param_groups[0]["lr"] == b.param_groups[0]["lr"] == 0.001
    assert a.param_groups[0]["ess"] == b.param_groups[0]["ess"] > 10 / 3e-3


def test_schedulers_scale_what_they_find() -> None:
    optimizer = IVON.from_adamw(lora(), lr=0.1, **COUNT)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    assert scheduler.get_last_lr() == [0.0033]
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.train()
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.0033 / 2


def test_finetune_trains_with_it() -> None:
    pytest.importorskip("peft")
    from ivon_lora.finetune.model import load_base

    for layers, taken in (("lora", 0.0033), ("adalora", 0.02)):
        settings = make_settings({"layers": layers, "lr": 0.02, "steps": 10})
        base = load_base(settings.model, 2, 0)
        assert make_method(base, settings, 50).peak_lr == pytest.approx(taken, rel=0.05)


@pytest.mark.parametrize("word", ["none", 0.01, math.inf])
def test_another_word_is_refused(word: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"lr_limit must be 'auto' or None, got {word!r}")):
        IVON.from_adamw(lora(), lr_limit=word, **COUNT)


def test_bad_learning_rates_and_parameters_are_refused_as_before() -> None:
    bad: Any
    for bad in (-1.0, math.nan):
        with pytest.raises(ValueError, match="lr must"):
            IVON.from_adamw(lora(), bad, **COUNT)
    bad = [*lora(), 3]
    with pytest.raises(TypeError, match="can only optimize Tensors"):
        IVON.from_adamw(bad, 0.1, **COUNT)
