"""Memory: 12 bytes of state per fp32 parameter, and temporaries that do not grow with the model."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ivon_lora import IVON, LoraAdapter, RankPruner, blocks, noise_store
from tests.compiler import BACKENDS


def peak_bytes(call: Callable[[], object]) -> tuple[int, int]:
    """Largest sum of live blocks that torch, and that Python with numpy, allocated during the call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        call()
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        call()
        return peak, tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def adapter(n: int) -> list[nn.Parameter]:
    """A and B of a LoRA layer of rank 8 with ``n`` elements in all, with gradients."""
    params = [nn.Parameter(torch.randn(8, n // 16)), nn.Parameter(torch.randn(n // 16, 8))]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def stepper(params: list[nn.Parameter], backend: str, pruned: bool) -> tuple[IVON, Callable[[], None]]:
    pruner = None
    if pruned:
        pruner = RankPruner(
            [LoraAdapter("a", params[0], params[1])], 4, total_steps=100, warmup=0, final=10, interval=1
        )
    optimizer = IVON(params, 1e-3, 100, backend=backend, pruner=pruner)

    def step() -> None:
        optimizer.train()
        optimizer.step()

    for _ in range(3):
        step()
    return optimizer, step


def test_what_is_measured_is_seen() -> None:
    torch_peak, python_peak = peak_bytes(lambda: (torch.ones(1000) + torch.ones(1000)).numpy().copy())
    assert torch_peak >= 12_000
    assert python_peak >= 4_000


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_takes_12_bytes_per_element_while_sampled_and_nothing_is_kept_beside_it(backend: str) -> None:
    n = 1 << 16
    optimizer, _ = stepper(adapter(n), backend, pruned=False)
    optimizer.train()
    tensors = [x for entry in optimizer.state.values() for x in entry.values() if isinstance(x, Tensor)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    assert sum(storages.values()) == 12 * n + 8  # and two counts
    optimizer.eval()
    assert set(optimizer.state[optimizer.param_groups[0]["params"][0]]) == {"step", "momentum", "hess"}


@pytest.mark.parametrize("pruned", [False, True], ids=["bare", "pruner"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_temporaries_of_a_step_do_not_grow_with_the_model(
    backend: str, pruned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside its noise a step of the eager backend may take some bytes for each element of a block, of any model."""
    monkeypatch.setattr(noise_store, "LIMIT", 1 << 20)
    peaks = [peak_bytes(stepper(adapter(n), backend, pruned)[1]) for n in (1 << 18, 1 << 20)]
    bound = (1 << 20) + ((1 << 18) if backend == "compile" else 8 * blocks.BLOCK)
    for small, large in zip(*peaks, strict=True):
        assert large <= bound
        assert large <= small + (64 << 10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_not_kept(backend: str) -> None:
    params = adapter(1 << 12)
    optimizer, step = stepper(params, backend, pruned=False)
    freed = []
    for p in params:
        assert p.grad is not None
        p.grad = p.grad.clone()
    step()
    for p in params:
        assert p.grad is not None
        storage = p.grad.untyped_storage()
        freed.append(storage._weak_ref())
        del storage
        p.grad = None
    assert all(torch.UntypedStorage._expired(reference) for reference in freed)
    for reference in freed:
        torch.UntypedStorage._free_weak_ref(reference)
    assert optimizer.completed_steps == 4
