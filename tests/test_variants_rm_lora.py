"""RM-LoRA against known answers."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from ivon_lora import LoraAdapter
from ivon_lora.variants import RmLora
from ivon_lora.variants.rm_lora import entropy_rank
from tests.variant_problem import RANK, loss_of, make_data, make_model, start


@pytest.mark.parametrize("optimizer", ["adamw", "vadam"])
@pytest.mark.parametrize("share", [True, False])
def test_exactly_k_ranks_of_each_layer_change(optimizer: str, share: bool) -> None:
    run = start("rm-lora", optimizer, ranks=2, orthogonality=0.1, share=share, exact=True)
    run.train(3)
    same = 0
    for _ in range(8):
        before = run.trained()
        run.train(1)
        for adapter in run.variant.adapters:
            sets = []
            for key, p, dim in adapter.tensors():
                old = before[f"{adapter.name}.lora_{key}.default.weight"]
                sets.append((p.detach() != old).movedim(dim, 0).flatten(1).any(1))
                assert int(sets[-1].sum()) == 2
            same += torch.equal(*sets)
    assert same == 16 if share else same < 16


@pytest.mark.parametrize("choose", ["uniform", "thompson"])
def test_all_ranks_get_their_turn(choose: str) -> None:
    run = start("rm-lora", "vadam", ranks=1, choose=choose)
    run.train(1)
    turns, steps = torch.zeros(2, RANK), 200
    for run.variant.step in range(1, steps + 1):  # draws without training, or of the sample in the weights
        if choose == "thompson":
            for adapter in run.variant.adapters:
                adapter.A.data.normal_()
                adapter.B.data.normal_()
        masks = run.variant.masked()[::2]
        turns += torch.stack([~mask for _, _, mask in masks])
    error = math.sqrt(steps * 0.25 * 0.75)
    assert (turns - steps / RANK).abs().max() < 4 * error
    if choose == "uniform":  # drawn for each layer
        assert not torch.equal(turns[0], turns[1])


def test_thompson_lets_the_weakest_ranks_of_the_sample_train() -> None:
    run = start("rm-lora", "vadam", ranks=1, choose="thompson", orthogonality=0.0)
    run.train(14)
    before = run.trained()
    loss_of(run.model).backward()
    adapter = run.variant.adapters[0]
    weakest = int((adapter.A.detach().norm(dim=1) * adapter.B.detach().norm(dim=0)).argmin())
    run.optimizer.step()
    moved = (adapter.A.detach() != before[f"{adapter.name}.lora_A.default.weight"]).any(1)
    assert moved.nonzero().flatten().tolist() == [weakest]


def test_the_gradient_of_a_head_is_left_alone() -> None:
    """The released code sets it to zero from the second step on."""
    model = nn.Sequential(make_model(), nn.Linear(8, 3))
    variant = RmLora(model, ranks=1)
    optimizer = torch.optim.SGD(variant.param_groups(), lr=0.1)
    variant.attach(optimizer)
    head: Any = model[1]
    for _ in range(3):
        optimizer.zero_grad()
        model(make_data()[0]).square().mean().backward()
        gradient, before = head.weight.grad.clone(), head.weight.detach().clone()
        optimizer.step()
        torch.testing.assert_close(head.weight.detach(), before - 0.1 * gradient)


def test_the_penalty_makes_ranks_orthonormal() -> None:
    run = start("rm-lora", "adamw", orthogonality=10.0, ranks=RANK, on="A")
    run.train(80)
    a = run.variant.adapters[0].A.detach()
    torch.testing.assert_close(a @ a.T, torch.eye(RANK), atol=0.1, rtol=0)


def test_the_entropy_rank_is_that_of_the_update() -> None:
    a, b = torch.randn(3, 7, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    values = torch.linalg.svdvals(b @ a).square()[:3]
    p = values / values.sum()
    expected = float((-(p * p.log()).sum()).exp())
    assert entropy_rank(LoraAdapter("x", a, b)) == pytest.approx(expected, rel=1e-9)
    assert entropy_rank(LoraAdapter("x", a, torch.zeros(5, 3))) == 0
    assert entropy_rank(LoraAdapter("x", torch.eye(3, 7), torch.eye(5, 3))) == pytest.approx(3)
