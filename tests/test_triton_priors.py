"""Priors that a step changes within its launches: their bits, their value, and that nothing else is asked for them."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from ivon_lora import IVON, LoraAdapter, RankPruner
from ivon_lora.backends import Work
from ivon_lora.backends.eager import BlockedEager
from ivon_lora.graphs import GraphedStep
from ivon_lora.kernels.launch import LaunchConfig, TritonBackend
from ivon_lora.prior import INTERVAL, Posterior, bounds, next_decays, set_decays
from tests.optimizer_problem import assert_same_state
from tests.specialization_keys import describe, keys_of
from tests.test_triton_lockstep import FISHER, KEY, TILE, assert_same_bits, make_works, moved

#: delta of every tensor of `make_works` before the step; None: that of the call, which stays
DECAYS = (0.05, 0.002, None, 3.0, 0.5, 0.05, 0.01, 0.3, 7e-4, 0.02)
#: the least of the deltas after it
INITIAL = 1e-4


@pytest.fixture(autouse=True)
def _numpy_may_meet_nan() -> Iterator[None]:
    """The interpreter computes with numpy, which warns where a GPU is silent."""
    with np.errstate(all="ignore"):
        yield


def works_with_priors(dtype: torch.dtype = torch.float32) -> list[Work]:
    works = make_works(dtype, banked=False)
    for w, decay in zip(works, DECAYS, strict=True):
        w.own_decay = None if decay is None else torch.tensor(decay)
    works[1].hess.view(-1)[:40] = 0.0  # the data say nothing of them
    works[8].mean.view(-1)[7::18] = 3e38  # of every rank; its square is infinite: the widest prior
    return works


def step(works: list[Work], device: str, bound: tuple[float, float] | None, **config: Any) -> TritonBackend:
    backend = TritonBackend(torch.device(device), LaunchConfig(**{"tile": TILE, **config}))
    backend.step(works, FISHER, KEY, 1, decay_bounds=bound)
    return backend


def decays(works: list[Work]) -> list[float | None]:
    return [None if w.own_decay is None else float(w.own_decay) for w in works]


def next_by_eager(works: list[Work]) -> None:
    own = [w for w in works if w.own_decay is not None]
    set_decays(next_decays([Posterior(w.param, w, FISHER.ess, INITIAL) for w in own]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deltas_have_the_bits_of_the_eager_backend(dtype: torch.dtype, triton_device: str) -> None:
    """Hard masks, gradients that are not finite, odd addresses, an empty tensor, one whose sum is infinite."""
    works = works_with_priors(dtype)
    ours = moved(works, triton_device)
    before = decays(works)
    BlockedEager().step(works, FISHER, KEY, 1)
    unchanged = step(ours, triton_device, None)
    assert_same_bits(works, ours)
    assert decays(ours) == decays(works) == before
    ours = moved(works, triton_device)
    BlockedEager().step(works, FISHER, KEY, 1)
    next_by_eager(works)
    backend = step(ours, triton_device, bounds(INITIAL))
    assert_same_bits(works, ours)
    assert decays(ours) == decays(works)
    changed = [a != b for a, b in zip(decays(ours), before, strict=True)]
    assert changed == [number not in (2, 4) for number in range(10)]  # the call's delta, and an empty tensor
    lowest = np.float32(bounds(INITIAL)[0])
    assert ours[8].own_decay == float(lowest)
    assert sum(d is not None and d > lowest for d in decays(ours)) >= 6
    for b in (unchanged, backend):
        (part,) = (p for site in b._sites.values() for p in site.parts if not p.kind.reread and p.kind.contiguous)
        assert not part.moments.any(), "sums are zero between two launches"


def test_delta_by_its_equation(triton_device: str) -> None:
    """1 / (lambda mean(m^2 + sigma^2)) in float64 numpy.

    Of the fp32 numbers: h + delta, its product with lambda, the quotient, the square, and the sum of both have a
    relative error of 2^-24 each, all terms are positive, and the mean, its product with lambda and the quotient round
    once more: 8 roundings.
    """
    generator = torch.Generator().manual_seed(3)
    n, own = 6001, torch.tensor(0.02, device=triton_device)
    mean, hess, grad = (torch.randn(n, generator=generator) for _ in range(3))
    param = mean.to(triton_device)
    momentum, hess, grad = torch.zeros_like(param), hess.abs().to(triton_device), grad.to(triton_device)
    work = Work(0, param, param, momentum, hess, grad, own_decay=own)
    step([work], triton_device, bounds(INITIAL))
    m, h = param.cpu().double().numpy(), work.hess.cpu().double().numpy()
    delta = float(np.float32(0.02))
    expected = 1 / (FISHER.ess * np.mean(m**2 + 1 / (FISHER.ess * (h + delta))))
    assert INITIAL < expected < 100 * INITIAL
    assert float(own) == pytest.approx(expected, rel=8 * 2.0**-24)


def test_bits_do_not_depend_on_the_tile(triton_device: str) -> None:
    """One tile per tensor or many, vectors or single elements."""
    found = []
    for config in ({"tile": 4096}, {"tile": 1024, "num_warps": 8}):
        works = moved([w for i, w in enumerate(works_with_priors()) if i in (0, 1, 9)], triton_device)
        step(works, triton_device, bounds(INITIAL), **config)
        found.append(decays(works))
    assert found[0] == found[1]


def test_a_step_that_changes_priors_draws_no_sample(triton_device: str) -> None:
    backend = TritonBackend(torch.device(triton_device))
    with pytest.raises(ValueError, match="cannot draw the next sample"):
        backend.step([], FISHER, KEY, 1, (FISHER, KEY), bounds(INITIAL))


# ---------------------------------------------------------------- in the optimizer


class Bed:
    """One adapter and a bias; gradients have the same bits everywhere."""

    def __init__(self, backend: str, device: str, dtype: torch.dtype = torch.float32, total_steps: int = 9) -> None:
        generator = torch.Generator().manual_seed(5)
        shapes = ((4, 8), (8, 4), (5,))
        self.params = [
            (torch.randn(s, generator=generator) * 0.3).to(dtype).to(device).requires_grad_() for s in shapes
        ]
        adapter = LoraAdapter("a", self.params[0], self.params[1])
        self.pruner = RankPruner([adapter], 2, total_steps=total_steps, warmup=1, final=3, interval=2)
        options: dict[str, Any] = {"hess_init": 0.5, "beta2": 0.9, "clip_radius": 0.3, "weight_decay": 0.02}
        options |= {"hess_approx": "fisher", "batch_size": 8, "prior": "empirical"}
        self.optimizer = IVON(self.params, 0.05, 50, pruner=self.pruner, backend=backend, **options)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, total_steps)
        self.targets = [torch.randn(s, generator=generator).to(device) for s in shapes]

    def closure(self) -> None:
        with torch.no_grad():
            for p, t in zip(self.params, self.targets, strict=True):
                p.grad = ((p.float() - t) * 0.5).to(p.dtype)

    def plain_step(self) -> None:
        self.optimizer.train()
        self.closure()
        self.optimizer.step()
        self.scheduler.step()

    def deltas(self) -> list[float]:
        return [float(self.optimizer.state[p]["weight_decay"]) for p in self.params]


@pytest.fixture
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Priors change after every third update: steps in Triton's interpreter are slow."""
    monkeypatch.setattr("ivon_lora.prior.INTERVAL", 3)


@pytest.mark.usefixtures("_soon")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recorded_steps_change_priors_when_they_are_due(
    dtype: torch.dtype, triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Allocations (2, 4, 6) and priors (3, 6, 9) fall together with, and without, each other; 7 to 9 are hard."""
    eager, ours = Bed("eager", "cpu", dtype), Bed("triton", triton_device, dtype)
    graphed = GraphedStep(ours.optimizer, ours.closure, warmup=2)
    seen = []
    for number in range(1, 10):
        eager.plain_step()
        with monkeypatch.context() as patch:
            patch.setattr("ivon_lora.update.next_decays", _refuse)
            graphed()
        ours.scheduler.step()
        assert_same_state(eager.optimizer, ours.optimizer, number)
        seen.append(ours.deltas())
    changes = [number for number in range(2, 10) if seen[number - 1] != seen[number - 2]]
    assert changes == [3, 6, 9]
    assert len(graphed._programs) == 4  # as without priors: soft, with an allocation, with the last one, hard
    names = [[launch.kernel.__name__ for launch in program.launches] for program in graphed._programs.values()]
    step = ["sample_kernel", "step_kernel"]
    assert sorted(names) == [step, step, [*step, "zero_kernel"], [*step, "zero_kernel"]]


def _refuse(posteriors: list[Posterior]) -> Any:
    """The sums of a recorded step belong into its launches."""
    assert posteriors == []
    return []


@pytest.mark.usefixtures("_soon")
def test_a_pruner_that_scores_after_the_launches_does_so_under_the_old_prior(triton_device: str) -> None:
    """With a frozen tensor the pruner reads the state: at step 3 ranks are allocated, and the prior changes."""
    beds = [Bed("eager", "cpu"), Bed("triton", triton_device)]
    for bed in beds:
        bed.pruner.interval = 3
        bed.params[0].requires_grad_(False)
        for _ in range(4):
            bed.plain_step()
            bed.params[0].grad = None
    eager, ours = beds
    assert_same_state(eager.optimizer, ours.optimizer)
    assert ours.optimizer.state[ours.params[1]]["weight_decay"] != torch.tensor(0.02)
    assert int(ours.pruner.mask(ours.pruner.adapters[0]).sum()) < 4


def test_moments_of_a_tensor_with_a_live_gate_count_before_it_is_zeroed() -> None:
    """The posterior that the update leaves decides, not the zeros that an allocation writes after it."""
    found = []
    for interval in (INTERVAL, 10 * INTERVAL):  # with and without an allocation at the step of the prior
        bed = Bed("eager", "cpu", total_steps=10 * INTERVAL)
        bed.pruner.interval = interval
        for _ in range(INTERVAL):
            bed.plain_step()
        found.append(bed.deltas())
        alive = int(bed.pruner.mask(bed.pruner.adapters[0]).sum())
        assert (alive < 4) == (interval == INTERVAL)
        assert bool((bed.params[1] == 0).any()) == (interval == INTERVAL)
    assert found[0] == found[1]
    assert all(math.isfinite(x) and x != np.float32(0.02) for x in found[0])


def test_no_prior_leads_to_another_compiled_kernel(triton_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, str, list[Any], dict[str, Any]]] = []

    def note(self: TritonBackend, kernel: Any, grid: Any, *arguments: Any, **constants: Any) -> None:
        made.append((kernel.fn.__module__, kernel.__name__, [describe(a) for a in arguments], constants))

    monkeypatch.setattr(TritonBackend, "_run", note)
    bed = Bed("triton", triton_device, total_steps=40)
    bed.pruner.interval = 100
    for number in range(2 * INTERVAL + 1):
        for group in bed.optimizer.param_groups:
            group["ess"], group["weight_decay"] = 50.0 + number, 0.02 * (1 + number)
        bed.plain_step()
    steps = [launch for launch in made if launch[1] == "step_kernel"]
    assert len(steps) == 2 * INTERVAL + 1
    assert len(set(keys_of(steps))) == 1


# ---------------------------------------------------------------- what cannot be recorded


def test_frozen_adapters_are_refused_by_a_recorded_step(triton_device: str) -> None:
    bed = Bed("triton", triton_device)
    graphed = GraphedStep(bed.optimizer, bed.closure, warmup=1)
    graphed()
    bed.params[0].requires_grad_(False)
    bed.params[0].grad = None
    with pytest.raises(ValueError, match=r"needs every tensor of the pruner's adapters to train, and A of 'a' is froz"):
        graphed()
    assert bed.optimizer.completed_steps == 1


def test_only_whole_fp32_tensors_change_within_a_launch(triton_device: str) -> None:
    p = torch.ones(3, dtype=torch.float64, device=triton_device)
    work = Work(0, p, p, p.clone(), p.clone(), p.clone(), own_decay=torch.tensor(0.1, device=triton_device))
    backend = TritonBackend(torch.device(triton_device), fallback=BlockedEager())
    with pytest.raises(ValueError, match="only fp32 state"):
        backend.step([work], dataclasses.replace(FISHER), KEY, 1, decay_bounds=bounds(0.1))
