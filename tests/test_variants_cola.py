"""COLA and its links: what is finished stays, exactly, and what is new is new."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ivon_lora import export_lora
from ivon_lora.variants.cola import carried
from tests.optimizer_problem import differing
from tests.variant_problem import RANK, Run, base, loss_of, make_data, make_model, start


@pytest.mark.parametrize("store", ["adapter", "base"])
def test_a_knot_changes_no_output_and_starts_anew(store: str) -> None:
    run = start("cola", "adamw", links=2, steps=100, store=store)
    run.train(9)
    before = run.logits()
    run.variant.finish()
    after = run.logits()
    if store == "adapter":
        assert torch.equal(after, before)  # 0 + link, for a link alone
    torch.testing.assert_close(after, before, atol=1e-6, rtol=0)
    assert not run.optimizer.state
    for adapter in run.variant.adapters:
        assert not adapter.B.any()
        assert 0.9 / 8**0.5 < adapter.A.abs().max() <= 1 / 8**0.5  # PEFT's start: uniform up to 1 / sqrt(inputs)


BOOSTERS = {"rank": 1, "booster_steps": 10, "layers": 1.0, "shrinkage": 0.5}


@pytest.mark.parametrize(
    ("method", "options", "share", "when"),
    [
        ("cola", {"links": 3}, 1.0, "in training"),
        ("cola", {"links": 3}, 1.0, "detached"),
        ("cola", {"links": 3, "store": "base"}, 1.0, "in training"),
        ("xgblora", BOOSTERS, 0.5, "detached"),
    ],
)
def test_the_exported_adapter_is_the_sum_of_the_links(
    method: str, options: dict[str, Any], share: float, when: str, tmp_path: Path
) -> None:
    from peft import PeftModel

    run = start(method, "adamw", steps=30, **options)
    act, pairs = run.variant.after_step, list[list[Tensor]]()

    def after_step() -> None:
        pairs.append([(a.B @ a.A).detach().clone() for a in run.variant.adapters])
        act()

    run.variant.after_step = after_step
    run.train(28)
    logits = run.logits()
    if when == "detached":
        run.variant.detach()
    report = export_lora(run.model, run.optimizer, tmp_path / "adapter")
    assert report.max_rank == 3 * options.get("rank", RANK)
    consumer: Any = PeftModel.from_pretrained(base(), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(consumer(make_data()[0]), logits, atol=1e-5, rtol=1e-5)
    for n, layer in enumerate(consumer.base_model.model.layers):
        delta = layer.get_delta_weight("default").detach()
        torch.testing.assert_close(delta, share * (pairs[9][n] + pairs[19][n]) + pairs[27][n], atol=1e-6, rtol=1e-5)


def test_peft_merges_and_saves_the_links(tmp_path: Path) -> None:
    run = start("cola", "adamw", links=3, steps=30)
    run.train(25)
    logits = run.logits()
    run.model.save_pretrained(tmp_path / "adapter")
    run.model.merge_adapter()
    torch.testing.assert_close(run.logits(), logits)
    run.model.unmerge_adapter()

    later = start("cola", "adamw", links=3, steps=30)
    later.model.load_adapter(str(tmp_path / "adapter"), "default")
    torch.testing.assert_close(later.logits(), logits, atol=0, rtol=0)
    make_model().save_pretrained(tmp_path / "plain")
    later.model.load_adapter(str(tmp_path / "plain"), "default")  # an adapter without links: those here are not its own
    make = make_model().eval()
    torch.testing.assert_close(later.logits(), make(make_data()[0]))


def test_links_that_a_fresh_base_lacks_are_merged_once(tmp_path: Path) -> None:
    def begun() -> Run:
        return start("cola", "adamw", links=3, steps=30, store="base")

    run = begun()
    run.train(25)
    logits = run.logits()
    run.model.save_pretrained(tmp_path / "adapter")
    alone, whole = begun(), begun()
    alone.model.load_adapter(str(tmp_path / "adapter"), "default")
    whole.model.load_state_dict(run.model.state_dict())
    for other in (alone, whole):
        assert differing(other.frozen(), run.frozen()) == []
        other.model.load_state_dict(run.model.state_dict())
        torch.testing.assert_close(other.logits(), logits, atol=0, rtol=0)
    begun().model.save_pretrained(tmp_path / "early")
    with pytest.raises(ValueError, match=r"base weights hold links of 8 ranks, the checkpoint has 0; .*fresh"):
        alone.model.load_adapter(str(tmp_path / "early"), "default")


@pytest.mark.parametrize("store", ["adapter", "base"])
def test_a_16_bit_base_keeps_its_bits_unless_it_is_asked_for(store: str) -> None:
    def halve(model: Any) -> None:
        for layer in model.base_model.model.layers:
            layer.base_layer.to(torch.bfloat16)

    run = start("cola", "adamw", links=2, steps=10, store=store, prepare=halve)
    before = run.frozen()
    for adapter in run.variant.adapters:
        adapter.B.data.normal_(std=1e-3)
    run.variant.finish()
    assert (differing(before, run.frozen()) == []) is (store == "adapter")
    lost = run.variant.history[-1]["lost"]
    assert lost > 0.05 if store == "base" else lost == 0


def test_later_links_may_have_smaller_ranks() -> None:
    run = start("cola", "vadam", links=3, steps=30, ranks=[4, 2, 1])
    run.train(25)
    layer = run.model.base_model.model.layers[0]
    links = layer.lora_links["default"]
    moved = torch.cat([links.B, layer.lora_B["default"].weight], 1).abs().sum(0) > 0
    assert moved.tolist() == [True] * 4 + [True, True, False, False] + [True, False, False, False]
    run.model.train()
    loss_of(run.model).backward()
    assert not layer.lora_B["default"].weight[:, 1:].any()  # in the sample too


def test_warm_up_lowers_the_rate_of_a_new_link_for_its_steps_alone() -> None:
    run = start("cola", "sgd", links=2, steps=8, warmup=3)
    run.optimizer.param_groups[0]["lr"] = 1.0
    adapter, sizes = run.variant.adapters[0], []
    for _ in range(8):
        before = adapter.B.detach().clone()
        run.train(1)
        grad = adapter.B.grad
        if grad is not None:
            sizes.append(float((before - adapter.B).detach().norm() / grad.norm()))
        assert run.optimizer.param_groups[0]["lr"] == 1.0
    assert sizes == pytest.approx([1, 1, 1, 0.25, 0.5, 0.75, 1], rel=1e-4)  # the step before the knot is forgotten


def test_the_carried_curvature_is_that_of_the_new_pair() -> None:
    """A linear-Gaussian model: y = W x + noise, whose Fisher matrix for the weight is gamma_i omega_j."""
    generator = torch.Generator().manual_seed(0)
    m, n, r, examples, s = 5, 6, 2, 40_000, 2.0
    omega, gamma = torch.rand(n, generator=generator) + 0.2, torch.rand(m, generator=generator) + 0.2
    x = torch.randn(examples, n, generator=generator) * omega.sqrt()
    error = torch.randn(examples, m, generator=generator) * gamma.sqrt()
    a, b, fresh = (torch.randn(*shape, generator=generator) for shape in ((r, n), (m, r), (r, n)))

    def fisher_b(a: Tensor) -> Tensor:
        return ((error[:, :, None] * s * (x @ a.T)[:, None, :]) ** 2).mean(0)

    fisher_a = ((s * (error @ b)[:, :, None] * x[:, None, :]) ** 2).mean(0)
    found = carried(fisher_a, fisher_b(a), a, fresh)
    torch.testing.assert_close(found, fisher_b(fresh), rtol=0.1, atol=0)
    exact = s**2 * gamma[:, None] * (fresh**2 @ omega)
    ideal_a, ideal_b = s**2 * (gamma @ b**2)[:, None] * omega, s**2 * gamma[:, None] * (a**2 @ omega)
    torch.testing.assert_close(carried(ideal_a, ideal_b, a, fresh), exact)


def test_a_link_that_carries_curvature_has_noise_at_once() -> None:
    run = start("cola", "vadam", links=2, steps=30, carry="curvature")
    run.train(15)
    adapter = run.variant.adapters[0]
    hess = run.optimizer.state[adapter.B]["hess"]
    assert (hess > 0).all()
    run.optimizer.train()
    assert (adapter.B != 0).all()
    assert torch.equal(run.optimizer.state[adapter.A]["mean"], adapter.A)  # A learns its own first
