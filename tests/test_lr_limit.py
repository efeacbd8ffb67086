"""``from_adamw(lr_limit="auto")``: at most 0.064 / sqrt(inputs) where B starts at zero, as LoRA's does."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ivon_lora import IVON
from ivon_lora.optim.lr_limit import lr_limit
from tests import replicated
from tests.two_processes import WORLD, Pool

COUNT: dict[str, Any] = {"num_examples": 10, "batch_size": 2}


def drawn(*shape: int) -> Tensor:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


def zeros(*shape: int) -> Tensor:
    return nn.Parameter(torch.zeros(shape))


def lora(inputs: int = 64, rank: int = 4) -> list[Tensor]:
    """A and B; the limit is 0.064 / 8 = 0.008 for 64 inputs."""
    return [drawn(rank, inputs), zeros(12, rank)]


# ---------------------------------------------------------------- the limit


def test_it_follows_the_median_number_of_inputs_of_the_matrices_that_are_drawn() -> None:
    assert lr_limit(lora()) == 0.008
    others = [drawn(3, 9), drawn(3, 999), drawn(40), zeros(7), zeros(4, 4)]  # vectors do not count, nor do zeros
    assert lr_limit([*lora(), *others]) == 0.008
    frozen = [drawn(5, 5).requires_grad_(False) for _ in range(9)]
    assert lr_limit([*lora(), *frozen]) == 0.008
    assert lr_limit([*lora(), drawn(2, 448)]) == 0.004  # halfway between 64 and 448: 256 inputs
    assert lr_limit([drawn(4, 16, 2, 2), zeros(8, 4, 1, 1)]) == 0.008  # a convolution of 16 channels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_it_does_not_depend_on_dtype_or_scale(dtype: torch.dtype, scale: float) -> None:
    """The squares of the smallest and largest elements are beyond fp16."""
    assert lr_limit([nn.Parameter((scale * p.detach()).to(dtype)) for p in lora()]) == 0.008


@pytest.mark.parametrize(
    "start",
    [
        lambda: [],
        lambda: [drawn(4, 20), drawn(12, 4)],  # training goes on
        lambda: [zeros(3, 5), zeros(5)],  # nothing is drawn
        lambda: [drawn(4, 20), drawn(12, 4), zeros(4, 1)],  # AdaLoRA: E is a column
        lambda: [drawn(8), zeros(8), zeros(0, 3), drawn(3, 4)],
        lambda: [nn.Parameter(p.detach().to("meta")) for p in lora()],
    ],
    ids=["nothing", "trained", "zeros", "adalora", "vectors", "meta"],
)
def test_no_limit_where_nothing_starts_as_lora_does(start: Callable[[], list[Tensor]]) -> None:
    assert lr_limit(start()) == math.inf


@pytest.mark.parametrize("start", [True, "gaussian"])
def test_it_falls_as_the_root_of_the_width(start: bool | str) -> None:
    """However PEFT draws A: uniformly within 1 / sqrt(width), or normal with a deviation of 1 / rank."""
    peft = pytest.importorskip("peft")
    for width, limit in ((384, 0.0033), (4 * 384, 0.0016)):
        config = peft.LoraConfig(r=8, target_modules=["0"], init_lora_weights=start)
        model = peft.get_peft_model(nn.Sequential(nn.Linear(width, 8)), config)
        optimizer = IVON.from_adamw(model.parameters(), lr=0.01, **COUNT)  # with the frozen layer
        assert optimizer.param_groups[0]["lr"] == limit == pytest.approx(0.064 / math.sqrt(width), rel=0.03)


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
    for lr, taken in ((0.008, 0.008), (1e-4, 1e-4), (0.1, 0.008)):
        assert caplog.text == ""
        (group,) = IVON.from_adamw(params(), lr, **COUNT).param_groups
        assert (group["lr"], len(group["params"])) == (taken, 2)
    assert "lr=0.1 is lowered to 0.008" in caplog.text


def test_the_type_of_a_learning_rate_stays_and_none_keeps_it() -> None:
    tensor = torch.tensor(0.1, dtype=torch.float64)
    lowered = IVON.from_adamw(lora(), tensor, **COUNT).param_groups[0]["lr"]
    assert isinstance(lowered, Tensor)
    assert (lowered.dtype, lowered.item(), tensor.item()) == (torch.float64, 0.008, 0.1)
    assert IVON.from_adamw(lora(), 0.1, lr_limit=None, **COUNT).param_groups[0]["lr"] == 0.1
    assert IVON(lora(), 0.1, 10.0).param_groups[0]["lr"] == 0.1


def test_every_group_has_its_own() -> None:
    groups: list[dict[str, Any]] = [
        {"params": lora()},
        {"params": lora(16), "lr": 0.05},
        {"params": lora(16), "lr": 0.002},
    ]
    groups += [{"params": [drawn(3, 3)]}, {"params": drawn(4, 20)}]
    before = [dict(group) for group in groups]
    optimizer = IVON.from_adamw(groups, lr=0.01, **COUNT)
    assert [group["lr"] for group in optimizer.param_groups] == [0.008, 0.016, 0.002, 0.01, 0.01]
    assert groups == before  # the caller's


def test_the_noise_is_that_of_the_lowered_learning_rate() -> None:
    """A limit below 3e-3 brings less noise, as a small learning rate does."""
    a, b = (IVON.from_adamw(lora(4096), lr, **COUNT) for lr in (0.1, 0.001))
    assert a.param_groups[0]["lr"] == b.param_groups[0]["lr"] == 0.001
    assert a.param_groups[0]["ess"] == b.param_groups[0]["ess"] > 10 / 3e-3


def test_schedulers_scale_what_they_find() -> None:
    optimizer = IVON.from_adamw(lora(), lr=0.1, **COUNT)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    assert scheduler.get_last_lr() == [0.008]
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.train()
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.008 / 2


def test_adapters_of_the_demo_and_gates_that_have_far_to_go() -> None:
    """LoRA on all-MiniLM-L6-v2 is limited, AdaLoRA's layers with their gates are not."""
    pytest.importorskip("peft")
    from ivon_lora.cli.finetune.methods import add_adapter, ivon_config
    from ivon_lora.cli.finetune.model import load_base
    from ivon_lora.cli.finetune.options import make_settings

    for layers, taken in (("lora", 0.0033), ("adalora", 0.02)):
        base = load_base()
        model = add_adapter(base, ivon_config(base, make_settings({"layers": layers, "steps": 10})), 0)
        optimizer = IVON.from_adamw([p for p in model.parameters() if p.requires_grad], lr=0.02, num_examples=50)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(taken, rel=0.05)


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
