"""What only a GPU can show: sizes beyond 32 bits, several devices and streams, no waiting, no recompilation.

The other tests of the kernels (`test_triton_*`, `test_kernels_noise`, `test_graphs`, `test_resample`) run on the GPU by
themselves where there is one.
"""

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from ivon_lora import IVON, LoraAdapter, RankPruner
from ivon_lora.backends import Work
from ivon_lora.functional.ivon import Hyper, draw_sample, estimate_curvature, ivon_step
from ivon_lora.functional.noise import NoiseKey, normal_array
from ivon_lora.graphs import GraphedStep
from ivon_lora.kernels.launch import LaunchConfig, TritonBackend

pytestmark = pytest.mark.gpu

HYPER = Hyper(777.0, 0.013, 0.07, 0.87, 1 - 0.87, 1 - 0.931, 0.37, 1.0, 1.0, 1.0, 777.0, "price", "newton")


class Bed:
    """Adapters under a pruner and a bias, anywhere; gradients are computed where the parameters are not."""

    def __init__(self, backend: str, *devices: str, empirical: bool = False, **schedule: Any) -> None:
        generator = torch.Generator().manual_seed(2)
        shapes = ((6, 40), (33, 6), (8, 64), (50, 8), (70,))
        self.params = [
            torch.randn(s, generator=generator).mul_(0.3).to(devices[i % len(devices)]).requires_grad_()
            for i, s in enumerate(shapes)
        ]
        self.targets = [torch.randn(s, generator=generator) for s in shapes]
        self.pruner = None
        if len(devices) == 1:
            adapters = [LoraAdapter(f"a{i}", self.params[i], self.params[i + 1]) for i in (0, 2)]
            options: dict[str, Any] = {"total_steps": 40, "warmup": 2, "final": 10, "interval": 5} | schedule
            self.pruner = RankPruner(adapters, 3, **options)
        settings: dict[str, Any] = {"hess_init": 0.3, "beta2": 0.95, "clip_radius": 0.3}
        if empirical:
            settings |= {"hess_approx": "fisher", "batch_size": 8, "weight_decay": 0.02, "prior": "empirical"}
        self.optimizer = IVON(self.params, 0.05, 300, pruner=self.pruner, backend=backend, **settings)

    def backward(self) -> None:
        for p, t in zip(self.params, self.targets, strict=True):
            p.grad = ((p.detach().cpu() - t) * 0.5).to(p.device)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.train()
            self.backward()
            self.optimizer.step()

    def everything(self) -> list[Tensor]:
        names = ("momentum", "hess", "rank_snr", "rank_mask", "weight_decay")
        state = [self.optimizer.state[p][n] for p in self.params for n in names if n in self.optimizer.state[p]]
        return [x.detach().cpu() for x in (*self.params, *state)]


def assert_same(expected: Bed, found: Bed) -> None:
    for a, b in zip(expected.everything(), found.everything(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("empirical", [False, True], ids=["fixed", "empirical"])
def test_forty_steps_with_allocations_have_the_bits_of_the_cpu(empirical: bool) -> None:
    eager, ours = Bed("eager", "cpu", empirical=empirical), Bed("auto", "cuda", empirical=empirical)
    for bed in (eager, ours):
        bed.run(40)
    assert ours.pruner is not None
    assert sum(int(ours.pruner.mask(a).sum()) for a in ours.pruner.adapters) == ours.pruner.target_budget
    assert_same(eager, ours)


def test_a_thousand_changes_of_priors_come_out_the_same() -> None:
    """Whoever finishes a tensor last sets its delta: large and small tensors, in any order of the programs."""

    def run(num_warps: int) -> Tensor:
        backend = TritonBackend(torch.device("cuda"), LaunchConfig(num_warps=num_warps))
        works = []
        for index, n in enumerate((3_000_001, 4096, 70_000, 513, 2, 250_000)):
            p, h = (torch.randn(n, generator=torch.Generator().manual_seed(s)).cuda() for s in (index, index + 9))
            own = torch.tensor(0.02, device="cuda")
            works.append(Work(index, p, p, torch.zeros_like(p), h.abs(), torch.zeros_like(p), own_decay=own))
        hyper = replace(HYPER, curvature="fisher", lr=0.0, rho=0.0)
        found = []
        for _ in range(1000):  # expectation maximisation on a posterior that stays
            backend.step(works, hyper, NoiseKey(0, 0), 1, decay_bounds=(1e-9, 1e9))
            found.append(torch.stack([w.own_decay for w in works if w.own_decay is not None]))
        return torch.stack(found).cpu()

    first, second = run(4), run(8)
    assert torch.equal(first, second)
    assert torch.equal(first[-1], first[-2]), "the fixed point"
    assert not torch.equal(first[0], first[1])


def test_more_elements_than_32_bits_can_count() -> None:
    n = 2**31 + 5
    free, _ = torch.cuda.mem_get_info()
    if free < 6 * 4 * n:
        pytest.skip(f"needs {6 * 4 * n / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} are free")
    device = torch.device("cuda")
    param = torch.full((n,), 0.25, device=device)
    state = {name: torch.full((n,), x, device=device) for name, x in (("momentum", 0.1), ("hess", 0.5), ("grad", 0.7))}
    work = Work(3, param, param, state["momentum"], state["hess"], mean_copy=torch.empty_like(param))
    backend, key = TritonBackend(device), NoiseKey(5, 6)
    backend.sample([work], HYPER, key)
    ends = [(0, 9), (2**31 - 3, 2**31 + 4), (n - 4, n)]
    for start, stop in ends:
        hess = np.full(stop - start, 0.5, np.float32)
        eps = normal_array(key, 3, start, stop)
        expected = draw_sample(np.full_like(hess, 0.25), hess, eps, HYPER.ess, HYPER.weight_decay)
        np.testing.assert_array_equal(param[start:stop].cpu().numpy(), expected)
    assert work.mean_copy is not None
    work.mean, work.mean_copy, work.grad = work.mean_copy, None, state["grad"]
    backend.step([work], HYPER, key, 1)
    for start, stop in ends:
        mean, momentum, hess, grad = (np.full(stop - start, x, np.float32) for x in (0.25, 0.1, 0.5, 0.7))
        curvature = estimate_curvature(grad, hess, normal_array(key, 3, start, stop), HYPER)
        expected, *_ = ivon_step(mean, momentum, hess, grad, curvature, HYPER, None)
        np.testing.assert_array_equal(param[start:stop].cpu().numpy(), expected.astype(np.float32))


def test_parameters_on_the_host_and_on_the_device() -> None:
    eager, mixed = Bed("eager", "cpu", "cpu"), Bed("auto", "cpu", "cuda")
    for bed in (eager, mixed):
        bed.run(3)
    assert_same(eager, mixed)


def test_parameters_on_several_devices() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    eager, ours = Bed("eager", "cpu", "cpu"), Bed("triton", "cuda:0", "cuda:1")
    for bed in (eager, ours):
        bed.run(3)
    assert_same(eager, ours)


def test_a_stream_of_ones_own() -> None:
    eager, ours = Bed("eager", "cpu"), Bed("triton", "cuda")
    eager.run(6)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ours.run(6)
    torch.cuda.current_stream().wait_stream(stream)
    assert_same(eager, ours)


@pytest.mark.parametrize("kind", ["step", "resample", "graph"])
def test_no_step_waits_for_the_device(kind: str) -> None:
    bed = Bed("triton", "cuda", empirical=True)
    bed.run(4)
    gradients = [p.grad for p in bed.params]

    def closure() -> None:
        for p, grad in zip(bed.params, gradients, strict=True):
            p.grad = grad

    graphed = GraphedStep(bed.optimizer, closure)

    def step() -> None:
        if kind == "graph":
            graphed()
        else:
            bed.optimizer.train()
            bed.optimizer.step(resample=kind == "resample")

    for _ in range(12):  # allocations included; graphs are captured, which waits
        step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if kind == "graph":
        assert graphed.graphs >= 2


def test_nothing_is_compiled_again_when_numbers_change() -> None:
    from ivon_lora.kernels.sample import sample_kernel
    from ivon_lora.kernels.step import step_kernel

    def compiled() -> int:
        return sum(len(cache[0]) for kernel in (sample_kernel, step_kernel) for cache in kernel.device_caches.values())

    bed = Bed("triton", "cuda", total_steps=200, final=20)
    bed.run(6)
    before = compiled()
    assert before >= 2
    for number in range(12):
        for group in bed.optimizer.param_groups:
            group["lr"], group["ess"], group["seed"] = 0.05 / (1 + number), 300.0 + number, number**15
        bed.run(1)
    assert compiled() == before
