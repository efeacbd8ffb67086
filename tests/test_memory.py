"""Memory: 12 bytes of state per fp32 parameter, and temporaries that do not grow with the model."""

import tracemalloc
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from ivon_lora import IVON, LoraAdapter, RankPruner
from ivon_lora.backends.eager import BLOCK
from tests.compiler import BACKENDS


def peak_bytes(call: Callable[[], object]) -> tuple[int, int]:
    """Largest sum of blocks in use that torch, and that Python with numpy, allocated during the call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        call()
    in_use = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            in_use += event.nbytes()
            peak = max(peak, in_use)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        call()
        return peak, tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def make(n: int, backend: str, pruned: bool = False) -> tuple[IVON, list[nn.Parameter], Callable[[], None]]:
    """A and B of a LoRA layer of rank 8 with ``n`` elements in all, with gradients, after three steps."""
    params = [nn.Parameter(torch.randn(8, n // 16)), nn.Parameter(torch.randn(n // 16, 8))]
    pruner = RankPruner([LoraAdapter("a", params[0], params[1])], 4, total_steps=100, warmup=0, final=10, interval=1)
    optimizer = IVON(params, 1e-3, 100, backend=backend, pruner=pruner if pruned else None)
    for p in params:
        p.grad = torch.randn_like(p)

    def step() -> None:
        optimizer.train()
        optimizer.step()

    for _ in range(3):
        step()
    return optimizer, params, step


def test_what_is_measured_is_seen() -> None:
    torch_peak, python_peak = peak_bytes(lambda: (torch.ones(1000) + torch.ones(1000)).numpy().copy())
    assert torch_peak >= 12_000
    assert python_peak >= 4_000


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_takes_12_bytes_per_element_while_sampled(backend: str) -> None:
    n = 1 << 16
    optimizer, params, _ = make(n, backend)
    optimizer.train()
    tensors = [x for entry in optimizer.state.values() for name, x in entry.items() if name != "step"]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    assert sum(storages.values()) == 12 * n
    optimizer.eval()
    assert set(optimizer.state[params[0]]) == {"step", "momentum", "hess"}


@pytest.mark.parametrize("pruned", [False, True], ids=["bare", "pruner"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_temporaries_of_a_step_do_not_grow_with_the_model(backend: str, pruned: bool) -> None:
    """Beside the means, which are there while the weights hold a sample."""
    sizes = 1 << 18, 1 << 20
    peaks = [(by_torch - 4 * n, other) for n in sizes for by_torch, other in [peak_bytes(make(n, backend, pruned)[2])]]
    bound = 80 * BLOCK if backend == "eager" else 1 << 18  # arrays of a block, or tables of addresses
    for small, large in zip(*peaks, strict=True):
        assert large <= bound
        assert large <= small + (64 << 10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_and_replaced_parameters_are_not_kept(backend: str) -> None:
    """Not beyond the next draw."""
    optimizer, params, step = make(1 << 12, backend)
    freed = []
    for p in params:
        assert p.grad is not None
        p.grad = p.grad.clone()
    step()
    for p in params:
        assert p.grad is not None
        freed += [t.untyped_storage()._weak_ref() for t in (p.grad, p.data)]
        p.grad, p.data = None, p.data.clone()
    optimizer.train()
    assert all(torch.UntypedStorage._expired(reference) for reference in freed)
    for reference in freed:
        torch.UntypedStorage._free_weak_ref(reference)
    assert optimizer.completed_steps == 4
