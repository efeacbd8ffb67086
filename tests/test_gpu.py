"""What only a GPU can show: sizes beyond 32 bits, several devices and streams, no waiting, no recompilation.

The other tests of the kernels (`test_triton_*`, `test_kernels_noise`) run on the GPU by themselves where there is one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from benchmarks.device_time import waits_for_device
from ivon_lora import IVON
from ivon_lora.functional.noise import NoiseKey, normal
from tests.optimizer_problem import assert_same_state
from tests.triton_runs import Make, assert_equal_runs, ivon, make_params, make_pruner, run, vadam

pytestmark = pytest.mark.gpu

#: A and B of two adapters, and a bias
SHAPES = ((6, 40), (33, 6), (8, 64), (50, 8), (70,))
every_algorithm = pytest.mark.parametrize("make", [ivon, vadam])


def pruned(make: Callable[..., Make], **schedule: Any) -> Make:
    """With a pruner of the first four parameters."""
    schedule = {"total_steps": 40, "warmup": 2, "final": 10, "interval": 5, **schedule}

    def made(params: Sequence[Tensor], backend: str) -> IVON:
        return make(pruner=make_pruner(params[:4], 3, **schedule))(params, backend)

    return made


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
        expected = 0.25 + sigma * normal(NoiseKey(5, 0), 0, (stop - start,), "cpu", start).numpy()
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


@pytest.mark.parametrize("devices", [("cpu", "cuda"), ("cuda:0", "cuda:1")], ids=str)
def test_parameters_on_several_devices(devices: tuple[str, str]) -> None:
    if "cuda:1" in devices and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    made = []
    for backend, where in (("eager", ("cpu", "cpu")), ("auto", devices)):
        params = [p for i, s in enumerate(SHAPES) for p in make_params([s], torch.float32, where[i % 2])]
        made.append(ivon()(params, backend))
        run(made[-1], params, 3)
    assert_same_state(*made)


def test_a_stream_of_ones_own() -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        assert_equal_runs(pruned(ivon), SHAPES, "cuda", steps=6)


@every_algorithm
def test_no_step_waits_for_the_device(make: Callable[..., Make]) -> None:
    params = make_params(SHAPES, torch.float32, "cuda")
    optimizer = pruned(make)(params, "triton")
    run(optimizer, params, 14)

    def step() -> None:
        optimizer.train()
        optimizer.step()

    assert not any(waits_for_device(step) for _ in range(10))  # allocations included


def test_nothing_is_compiled_again_when_numbers_change() -> None:
    from ivon_lora.kernels.sample import sample_kernel
    from ivon_lora.kernels.step import step_kernel

    def compiled() -> int:
        return sum(len(cache[0]) for kernel in (sample_kernel, step_kernel) for cache in kernel.device_caches.values())

    params = make_params(SHAPES, torch.float32, "cuda")
    optimizer = pruned(ivon, total_steps=200, final=20)(params, "triton")
    run(optimizer, params, 6)
    before = compiled()
    assert before >= 2
    for number in range(12):
        for group in optimizer.param_groups:
            group["lr"], group["ess"], group["seed"] = 0.05 / (1 + number), 300.0 + number, number**15
        run(optimizer, params, 1)
    assert compiled() == before
