"""`step(resample=True)` is `step()` and `train()`, in fewer launches where the kernels run."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ivon_lora import IVON, LoraAdapter, RankPruner
from tests.optimizer_problem import assert_same_state


@pytest.fixture(autouse=True)
def _numpy_may_meet_nan() -> Iterator[None]:
    """The interpreter computes with numpy, which warns where a GPU is silent."""
    with np.errstate(all="ignore"):
        yield


class Bed:
    """An adapter and a bias in two groups; ranks are allocated after steps 3 and 4, then masks are final."""

    def __init__(self, backend: str, device: str, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        generator = torch.Generator().manual_seed(9)
        shapes = ((4, 8), (8, 4), (4,))
        self.params = [
            (torch.randn(s, generator=generator) * 0.3).to(dtype).to(device).requires_grad_() for s in shapes
        ]
        self.targets = [torch.randn(s, generator=generator) for s in shapes]
        adapter = LoraAdapter("a", self.params[0], self.params[1])
        self.pruner = RankPruner([adapter], 2, total_steps=7, warmup=1, final=3, interval=3)
        arguments = {"beta2": 0.9, "hess_init": 0.5, "weight_decay": 0.01} | options
        self.optimizer = IVON(self.params, 0.05, 50, pruner=self.pruner, backend=backend, **arguments)

    def backward(self) -> None:
        for p, t in zip(self.params, self.targets, strict=True):
            p.grad = ((p.detach().cpu().float() - t) * 0.5).to(p.dtype).to(p.device)


def assert_same(expected: Bed, found: Bed, step: int) -> None:
    assert_same_state(expected.optimizer, found.optimizer, step)
    saved = [bed.optimizer.state_dict()["param_groups"][0] for bed in (expected, found)]
    assert saved[0]["live_sample"] == saved[1]["live_sample"] == 0
    assert saved[0]["completed_steps"] == saved[1]["completed_steps"] == step + 1


def step_both(eager: Bed, ours: Bed, step: int) -> None:
    """A step and the next sample, in two calls and in one."""
    for bed in (eager, ours):
        bed.backward()
    eager.optimizer.step()
    eager.optimizer.train()
    ours.optimizer.step(resample=True)
    assert_same(eager, ours, step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_has_the_bits_of_a_step_and_a_draw(
    dtype: torch.dtype, triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from ivon_lora.kernels.launch import TritonBackend

    options: dict[str, Any] = {}
    if dtype == torch.bfloat16:  # no noise in the first ten updates
        options = {"hess_init": "auto", "hess_approx": "fisher", "batch_size": 8, "step_rule": "adam"}
    eager, ours = Bed("eager", "cpu", dtype, **options), Bed("triton", triton_device, dtype, **options)
    names: list[str] = []
    run = TritonBackend._run

    def counting(self: TritonBackend, kernel: Any, *arguments: Any, **constants: Any) -> None:
        names.append(kernel.__name__)
        run(self, kernel, *arguments, **constants)

    monkeypatch.setattr(TritonBackend, "_run", counting)
    eager.optimizer.train()
    ours.optimizer.train()
    for step in range(6):
        names.clear()
        step_both(eager, ours, step)
        if ours.pruner.is_due(step + 1):
            assert names == ["step_kernel", "zero_kernel", "sample_kernel"]
        else:
            assert names == ["step_kernel", "importance_kernel", "score_kernel"]  # the latter two for who compares
    for bed in (eager, ours):
        bed.optimizer.eval()
    assert_same_state(eager.optimizer, ours.optimizer)


def test_the_first_step_may_come_without_a_sample(triton_device: str) -> None:
    """Then the mean is read from the parameter itself, and kept beside the sample from then on."""
    pytest.importorskip("triton")
    eager, ours = Bed("eager", "cpu"), Bed("triton", triton_device)
    for bed in (eager, ours):
        with bed.optimizer.sampled_params(train=True):
            bed.backward()
    eager.optimizer.step()
    eager.optimizer.train()
    ours.optimizer.step(resample=True)
    assert_same(eager, ours, 0)


def test_the_memory_of_the_means_may_move_between_steps(triton_device: str) -> None:
    pytest.importorskip("triton")
    eager, ours = Bed("eager", "cpu"), Bed("triton", triton_device)
    kept: list[Tensor] = []  # so that no memory comes back
    for bed in (eager, ours):
        bed.optimizer.train()
    for step in range(3):
        step_both(eager, ours, step)
        for p in ours.params:
            mean = ours.optimizer.state[p]["mean"]
            kept.append(mean.data)
            mean.data = mean.data.clone()
            kept[-1].fill_(torch.nan)


def test_every_backend_and_every_loop_ends_with_a_live_sample(triton_device: str) -> None:
    """Where the launch cannot end with a sample: a parameter without gradient, other backends, a fp64 parameter."""
    for backend, device in (("eager", "cpu"), ("triton", triton_device)):
        if backend == "triton":
            pytest.importorskip("triton")
        twins = []
        for resample in (True, False):
            params = [torch.full((6,), 0.5, device=device, requires_grad=True) for _ in range(2)]
            params.append(torch.full((3,), 0.5, device=device, dtype=torch.float64, requires_grad=True))
            optimizer = IVON(params, 0.1, 20, backend=backend)
            for step in range(2):
                optimizer.train()
                for p in params[step:]:
                    p.grad = torch.ones_like(p)
                optimizer.step(resample=resample)
            if not resample:
                optimizer.train()
            twins.append((params, optimizer))
        (first, one), (second, other) = twins
        assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))
        assert not torch.equal(first[0], one.state[first[0]]["mean"])
        assert one.state_dict()["param_groups"][0]["live_sample"] == 0
        assert torch.equal(one.state[first[1]]["mean"], other.state[second[1]]["mean"])


def test_a_closure_and_the_next_sample(triton_device: str) -> None:
    p = torch.full((4,), 0.5, requires_grad=True)
    optimizer = IVON([p], 0.1, 20)
    seen: list[Tensor] = []

    def closure() -> Tensor:
        seen.append(p.detach().clone())
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure, resample=True)
    drawn = p.detach().clone()
    optimizer.step(closure)
    assert torch.equal(seen[1], drawn)
    assert not torch.equal(seen[1], seen[0])
