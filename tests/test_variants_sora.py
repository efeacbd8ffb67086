"""SoRA against known answers; the marked ones fail for the released code."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ivon_lora import IVON, VAdam, find_adapters
from ivon_lora.variants import Sora
from ivon_lora.variants.sora import mean_absolute, soft
from tests.variant_problem import loss_of, make_model, start


def test_soft_is_the_minimiser_and_does_not_cut_between_t_and_2t() -> None:
    """The released rule shrinks first, then cuts: all of |x| < 2t becomes 0."""
    grid = torch.linspace(-3, 3, 20001, dtype=torch.float64)
    for x in (-2.0, -0.7, -0.2, 0.0, 0.3, 0.75, 1.9):
        best = grid[((grid - x).square() / 2 + 0.5 * grid.abs()).argmin()]
        assert float(soft(torch.tensor(x), torch.tensor(0.5))) == pytest.approx(float(best), abs=2e-4)


@pytest.mark.parametrize("name", ["sgd", "adamw", "vadam"])
def test_the_orthogonal_lasso_is_solved(name: str) -> None:
    """min ||g - y||^2 / 2 + 0.5 ||g||_1 for y = 2, 0.8, 0.3; AdamW with a constant threshold ends at 1.84, .76, .25."""
    model = make_model(rank=3)
    steps = 600
    variant = Sora(model, steps, strength=0.5, init="ones", final=0.0)
    groups = [{**group, "params": group["params"]} for group in variant.param_groups()]
    optimizer: Any = {
        "sgd": lambda: torch.optim.SGD(groups, lr=0.05),
        "adamw": lambda: torch.optim.AdamW(groups, lr=0.02),
        "vadam": lambda: VAdam(groups, lr=0.02, num_examples=10**6, batch_size=100, noise_warmup=0, lr_limit=None),
    }[name]()
    variant.attach(optimizer)
    gate = variant.adapters[0].E
    assert gate is not None
    target = torch.tensor([2.0, 0.8, 0.3])
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = (0.05 if name == "sgd" else 0.02) * min(1.0, 2 * (1 - step / steps))
        if isinstance(optimizer, VAdam):
            optimizer.train()
        optimizer.zero_grad()
        ((gate.flatten() - target).square().sum() / 2).backward()
        optimizer.step()
    torch.testing.assert_close(gate.detach().flatten(), torch.tensor([1.5, 0.3, 0.0]), atol=2e-3, rtol=0)


def test_a_gate_falls_no_faster_than_a_clipped_step() -> None:
    """In the published settings of IVON a unit of gradient is a step of 1000, clipped to 1e-3."""
    model = make_model()
    variant = Sora(model, 100, strength=1.0, init="ones", final=0.0)
    groups = [{"params": group["params"]} for group in variant.param_groups()]
    optimizer = IVON(groups, 1.0, ess=1e7, hess_init=1e-3, clip_radius=1e-3, rescale_lr=False)
    optimizer.attach(model)
    variant.attach(optimizer)
    loss_of(model).backward()
    optimizer.step()
    for adapter in variant.adapters:
        assert adapter.E is not None
        assert bool(((adapter.E > 1 - 3.1e-3) & (adapter.E < 1)).all())


def test_the_group_step_is_the_minimiser_of_each_column() -> None:
    model = make_model()
    variant = Sora(model, 10, strength=0.5, metric="lr", final=0.0, on="columns")
    optimizer = torch.optim.SGD(variant.param_groups(), lr=0.2)
    b = variant.adapters[0].B
    b.data.normal_(std=0.05)
    b.data[:, 0] *= 0.1
    before = b.detach().clone()
    variant.attach(optimizer)
    optimizer.step()  # no gradients: the proximal step alone, t = 0.1
    scales = torch.linspace(0, 1, 5001)
    for column, found in zip(before.T, b.detach().T, strict=True):
        norm = column.norm()
        best = scales[((scales - 1).square() * norm.square() / 2 + 0.1 * scales * norm).argmin()]
        torch.testing.assert_close(found, best * column, atol=1e-4, rtol=0)
    assert variant.kept()[variant.adapters[0].name] < 4


def test_the_schedule_grows_from_nothing_to_the_whole() -> None:
    for schedule in ("linear", "log", "exp"):
        variant = Sora(make_model(), 100, strength=0.4, schedule=schedule, stages=4, final=0.2)
        found = []
        for variant.step in range(0, 80, 20):
            found.append(variant.current_strength())
        assert found[0] == 0
        assert found[-1] == pytest.approx(0.4)
        assert found == sorted(found)


@pytest.mark.parametrize("optimizer", ["adamw", "vadam"])
def test_dead_ranks_stay_dead_in_the_final_phase_and_are_dropped(optimizer: str) -> None:
    run = start("sora", optimizer, steps=120, strength=0.1, final=0.5)
    run.train(65)
    kept = run.variant.kept()
    assert 0 < sum(kept.values()) < 8
    gate = run.variant.adapters[0].E
    assert gate is not None
    dead = gate.detach() == 0
    run.train(20)
    assert run.variant.kept() == kept
    run.model(torch.zeros(2, 8))  # a training forward: VAdam's sample is live, without noise on dead ranks
    assert torch.equal(gate.detach() == 0, dead)
    run.variant.detach()
    ranks = {a.name: int((a.B.detach() != 0).any(0).sum()) for a in find_adapters(run.model)}
    assert ranks == kept


def test_mean_absolute_is_the_integral() -> None:
    x = torch.linspace(-12, 12, 200001, dtype=torch.float64)
    for mean, std in ((0.0, 1.0), (1.0, 0.5), (-0.3, 2.0)):
        density = torch.distributions.Normal(mean, std).log_prob(x).exp()
        expected = torch.trapezoid(x.abs() * density, x)
        found = mean_absolute(torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64))
        torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-6)


def test_the_automatic_strength_is_the_laplace_priors() -> None:
    run = start("sora", "vadam", strength="auto", init="normal")
    run.train(10)
    gates: list[Tensor] = [a.E for a in run.variant.adapters if a.E is not None]
    draws = torch.cat([run.optimizer.posterior(g).sample((20000,)).abs().mean(0).flatten() for g in gates])
    ess = run.optimizer.param_groups[0]["ess"]
    run.variant.automatic = 0.0
    assert run.variant.current_strength() == pytest.approx(1 / (ess * float(draws.mean())), rel=0.02)
