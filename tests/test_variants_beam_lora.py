"""BeamLoRA against known answers; the copy of moments fails for the released code."""

import math
from typing import Any

import pytest
import torch

from ivon_lora.variants import BeamLora
from ivon_lora.variants.beam_lora import head, softmax
from ivon_lora.variants.resting import tensors_of, whole_values
from tests.variant_problem import RANK, Run, make_model, start


def beam(optimizer: str, **options: Any) -> tuple[Run, Any]:
    """A run in which the first layer's last rank is pruned in step 10, in favour of its first."""
    options = {"interval": 10, "top_p": 0.85, "temperature": 0.5, **options}
    run = start("beamlora", optimizer, steps=200, **options)
    return run, run.variant


def set_gates(variant: Any) -> None:
    variant.gates[0].data.copy_(torch.tensor([1.0, 0.8, 0.7, -0.5]))


def test_what_is_pruned_is_what_lies_beyond_the_head() -> None:
    pool = torch.tensor([1.0, 4.0, 0.5, 2.0, 0.5, 2.0])  # sorted sums: 4, 6, 8, 9, 9.5, 10
    assert head(pool, 0.9).tolist() == [True, True, False, True, False, True]
    assert head(pool, 0.95).tolist() == [True, True, True, True, False, True]  # of equal ones the first stays
    assert head(pool, 0.59).tolist() == [False, True, False, False, False, False]
    assert head(torch.rand(1000), 1.0).all()


def test_the_share_that_is_pruned_fades_out() -> None:
    variant = BeamLora(make_model(), 300, top_p=0.9, until=200)
    found = []
    for variant.step in (0, 50, 100, 200, 250):
        found.append(1 - variant.top_p_now())
    expected = [0.1 * (1 + math.cos(math.pi * t / 200)) / 2 for t in (0, 50, 100, 200)]
    assert found == pytest.approx([*expected, 0.0])


@pytest.mark.parametrize("optimizer", ["adamw", "vadam"])
def test_a_copy_has_the_weights_and_moments_of_half_an_interval_ago(optimizer: str) -> None:
    run, variant = beam(optimizer)
    run.train(5)
    adapter = variant.adapters[0]
    cached = {key: whole_values(run.optimizer, p) for key, p, _ in adapter.tensors()}
    run.train(4)
    set_gates(variant)
    run.train(1)
    (row,) = [row for row in variant.history if row["layer"] == adapter.name]
    assert (row["step"], row["slot"], row["parent"]) == (10, 3, 0)
    for key, p, dim in adapter.tensors():
        now = tensors_of(run.optimizer, p)
        assert cached[key].keys() == now.keys() > {""}
        for name, value in cached[key].items():
            assert torch.equal(now[name].select(dim, 3), value.select(dim, 0))
            assert not torch.equal(now[name].select(dim, 0), value.select(dim, 0))  # the parent keeps its present ones
    gate = tensors_of(run.optimizer, variant.gates[0])
    assert gate[""][0] == gate[""][3] == pytest.approx(0.25, abs=0.05)
    assert not any(value.any() for name, value in gate.items() if name not in ("", "hess"))


@pytest.mark.parametrize("merge", ["sum", "average"])
def test_merging_as_a_sum_leaves_all_other_importances_alone(merge: str) -> None:
    _, variant = beam("vadam", merge=merge)
    set_gates(variant)
    before = softmax(variant.gates[0].detach(), 0.5)
    factor = variant._merge_gates(0, 3, 0)
    after = variant.gates.factor(0)
    assert after[0] == after[3] == pytest.approx(factor * float(before[0]))
    if merge == "sum":
        assert float(after[0]) == pytest.approx(float(before[0] + before[3]) / 2)
        torch.testing.assert_close(after[1:3], before[1:3])
    else:
        assert float(after[0] / before[0]) == pytest.approx(factor)
        assert (after[1:3] > 1.05 * before[1:3]).all()


@pytest.mark.parametrize("score", ["gate", "snr"])
def test_a_child_of_now_changes_the_update_by_what_it_takes_from_the_pruned_rank(score: str) -> None:
    """With no spread: s w_q (b_p a_p - b_q a_q) with gates, -s b_q a_q without."""
    run, variant = beam("vadam", parents="now", merge="sum", score=score, interval=50)
    run.train(15)
    if score == "gate":
        set_gates(variant)
    variant.normals = lambda shape, index=0, draw=0: torch.zeros(shape)
    adapter = variant.adapters[0]

    def update() -> torch.Tensor:
        w = torch.ones(RANK) if variant.gates is None else variant.gates.factor(0)
        return adapter.scaling * (adapter.B.detach() * w) @ adapter.A.detach()

    scores, before = variant.importances()[0], update()
    order = scores.argsort(descending=True).tolist()
    parent, slot = order[0], order[-1]
    w_q = 1.0 if variant.gates is None else float(variant.gates.factor(0)[slot])
    product = [torch.outer(adapter.B.detach()[:, k], adapter.A.detach()[k]) for k in (parent, slot)]
    hess = run.optimizer.state[adapter.A]["hess"][parent].clone()
    variant._copy(0, adapter, slot, parent)
    expected = w_q * (product[0] - product[1]) if score == "gate" else -product[1]
    torch.testing.assert_close(update() - before, adapter.scaling * expected, atol=1e-6, rtol=1e-4)
    state = run.optimizer.state[adapter.A]
    torch.testing.assert_close(state["hess"][slot], state["hess"][parent])
    if score == "snr":
        torch.testing.assert_close(state["hess"][slot], hess / 4)
    assert not state["momentum"][slot].any()


def test_a_child_of_now_is_as_far_from_its_parent_as_the_posterior_says() -> None:
    run, variant = beam("vadam", parents="now", interval=50)
    run.train(15)
    a = variant.adapters[0].A
    distances = []
    for variant.step in range(200):
        std = run.optimizer.posterior(a).stddev[0].clone()
        variant._copy(0, variant.adapters[0], 3, 0)
        distances.append((a.detach()[3] - a.detach()[0]) / std)
    z = torch.stack(distances)
    assert abs(float(z.mean())) < 0.1
    assert float(z.std()) == pytest.approx(1.0, abs=0.1)


def test_a_layer_of_which_nothing_is_kept_is_left_alone() -> None:
    run, variant = beam("adamw", top_p=0.55)
    variant.gates[0].data.copy_(torch.tensor([2.0, -3.0, -3.0, -3.0]))
    variant.step = 10
    variant.cache = [{key: whole_values(run.optimizer, p) for key, p, _ in a.tensors()} for a in variant.adapters]
    variant._allocate()
    name = variant.adapters[0].name
    assert variant.history == [{"step": 10, "layer": name, "slot": slot, "parent": 0} for slot in (1, 2, 3)]
