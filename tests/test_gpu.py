"""What only a GPU can show: sizes beyond 32 bits, several devices and streams, no waiting, no recompilation.

The other tests of the kernels (`test_triton_*`, `test_kernels_noise`) run on the GPU by themselves where there is one.
"""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from ivon_lora import IVON, LoraAdapter, RankPruner, VAdam
from ivon_lora.functional.noise import NoiseKey, normal_array

pytestmark = pytest.mark.gpu


class Bed:
    """Adapters under a pruner and a bias, anywhere; gradients are computed where the parameters are not."""

    def __init__(self, backend: str, *devices: str, vadam: bool = False, **schedule: Any) -> None:
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
        if vadam:
            recipe: dict[str, Any] = {"lr": 0.05, "num_examples": 300, "batch_size": 8, "noise_warmup": 0}
            self.optimizer: IVON = VAdam(self.params, pruner=self.pruner, backend=backend, **recipe)
        else:
            ivon: dict[str, Any] = {"hess_init": 0.3, "beta2": 0.95, "clip_radius": 0.3}
            self.optimizer = IVON(self.params, 0.05, 300, pruner=self.pruner, backend=backend, **ivon)

    def backward(self) -> None:
        for p, t in zip(self.params, self.targets, strict=True):
            p.grad = ((p.detach().cpu() - t) * 0.5).to(p.device)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.train()
            self.backward()
            self.optimizer.step()

    def everything(self) -> list[Tensor]:
        names = ("momentum", "hess", "rank_snr", "rank_mask")
        state = [self.optimizer.state[p][n] for p in self.params for n in names if n in self.optimizer.state[p]]
        return [x.detach().cpu() for x in (*self.params, *state)]


def assert_same(expected: Bed, found: Bed) -> None:
    for a, b in zip(expected.everything(), found.everything(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("vadam", [False, True], ids=["ivon", "vadam"])
def test_forty_steps_with_allocations_have_the_bits_of_the_cpu(vadam: bool) -> None:
    eager, ours = Bed("eager", "cpu", vadam=vadam), Bed("auto", "cuda", vadam=vadam)
    for bed in (eager, ours):
        bed.run(40)
    assert ours.pruner is not None
    assert (
        sum(int(ours.optimizer.state[a.A]["rank_mask"].sum()) for a in ours.pruner.adapters)
        == ours.pruner.target_budget
    )
    assert_same(eager, ours)


def test_more_elements_than_32_bits_can_count() -> None:
    """A sample and a step of a tensor that is alike everywhere but for the noise."""
    n = 2**31 + 5
    free, _ = torch.cuda.mem_get_info()
    if free < 6 * 4 * n:
        pytest.skip(f"needs {6 * 4 * n / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} are free")
    ends = [(0, 8), (2**31 - 4, 2**31 + 4), (n - 5, n)]
    options: dict[str, Any] = {"lr": 0.05, "ess": 300, "hess_init": 0.5, "weight_decay": 0.0, "seed": 5}
    param = torch.full((n,), 0.25, device="cuda", requires_grad=True)
    optimizer = IVON([param], backend="triton", **options)
    optimizer.train()
    sigma = np.float32(1) / np.sqrt(np.float32(300 * 0.5))
    for start, stop in ends:
        expected = 0.25 + sigma * normal_array(NoiseKey(5, 0), 0, start, stop)
        np.testing.assert_allclose(param[start:stop].detach().cpu().numpy(), expected, rtol=1e-6)
    param.grad = torch.full((n,), 0.7, device="cuda")
    optimizer.step()
    found = torch.cat([optimizer.state[param]["hess"][start:stop].cpu() for start, stop in ends])
    small = torch.full((8,), 0.25, requires_grad=True)
    for start, stop in ends[:1]:  # the first elements alone, on the CPU
        eager = IVON([small], backend="eager", **options)
        eager.train()
        small.grad = torch.full((8,), 0.7)
        eager.step()
        assert torch.equal(eager.state[small]["hess"], found[: stop - start])
        assert torch.equal(small.detach(), param[start:stop].detach().cpu())
    assert len(torch.unique(found)) == len(found), "every element has noise of its own"
    assert torch.isfinite(found).all()


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


@pytest.mark.parametrize("vadam", [False, True], ids=["ivon", "vadam"])
def test_no_step_waits_for_the_device(vadam: bool) -> None:
    bed = Bed("triton", "cuda", vadam=vadam)
    bed.run(14)  # allocations included
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            bed.optimizer.train()
            bed.optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


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
