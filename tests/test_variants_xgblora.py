"""XGBLoRA: layers that are chosen, layers that rest, and the sum of the boosters."""

import pytest
import torch
from torch import nn

from ivon_lora import VAdam
from ivon_lora.variants.gradients import gain
from ivon_lora.variants.layers import block_of
from ivon_lora.variants.xgblora import XgbLora
from tests.optimizer_problem import differing
from tests.variant_problem import loss_of, make_planted, start


def test_the_gain_is_what_the_minimiser_of_a_quadratic_gains() -> None:
    gradient, hess, decay = torch.randn(5), torch.rand(5) + 0.1, 0.3

    def loss(x: torch.Tensor) -> float:
        return float((gradient * x + (hess + decay) * x**2 / 2).sum())

    best = -gradient / (hess + decay)
    assert gain(gradient.square(), hess, decay) == pytest.approx(-loss(best), rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "vadam"])
def test_layers_at_rest_keep_their_bits_and_every_layer_has_its_turn(optimizer: str) -> None:
    run = start("xgblora", optimizer, booster_steps=5)
    seen = set()
    for _ in range(6):
        (chosen,) = run.variant.chosen
        seen.add(chosen)
        before = run.trained()
        run.model.train()
        run.train(4)
        loss_of(run.model).backward()  # a sample is live
        assert {name.split(".lora_")[0] for name in differing(before, run.trained())} == {chosen}
        run.optimizer.step()
    assert len(seen) == 2
    assert [row["step"] for row in run.variant.history] == [5, 10, 15, 20, 25, 30]


def test_gain_finds_the_block_that_was_changed() -> None:
    model, loss = make_planted((3,), rank=1)
    variant = XgbLora(model, booster_steps=20, layers=0.1, choose="gain")
    optimizer = VAdam(variant.param_groups(), lr=1e-3, num_examples=1000, batch_size=32, lr_limit=None)
    variant.attach(optimizer)
    optimizer.attach(model)
    for step in range(12):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        assert len(variant.chosen) == (8 if step < 9 else 1)
    assert variant.chosen == ["base_model.model.layers.3"]
    assert not any(adapter.B.any() for adapter in variant.adapters if ".layers.3" not in adapter.name)


def test_a_block_is_an_entry_of_an_outermost_list_and_no_list() -> None:
    inner = nn.ModuleDict({"first": nn.Linear(2, 2), "again": nn.ModuleList([nn.Linear(2, 2)])})
    towers = nn.ModuleList([nn.ModuleList([inner, nn.Linear(2, 2)])])
    model = nn.ModuleDict({"towers": towers, "below": nn.ModuleDict({"list": towers[0]}), "head": nn.Linear(2, 2)})
    blocks: dict[str, str | None] = {"towers.0.0.again.0": "towers.0.0", "towers.0.1": "towers.0.1", "head": None}
    blocks |= {"towers.0.0.first": "towers.0.0", "below.list.0.first": "below.list.0"}
    assert {name: block_of(model, name) for name in blocks} == blocks


def test_many_boosters_can_be_compressed() -> None:
    run = start("xgblora", "adamw", rank=1, booster_steps=2, layers=1.0, compress=4)
    run.train(11)
    links = run.model.base_model.model.layers[0].lora_links["default"]
    assert links.A.shape == (4, 8)
    assert 0 < run.variant.history[-1]["lost"] < 1
    logits = run.logits()
    run.variant.detach()
    torch.testing.assert_close(run.logits(), logits)
