"""Loops that people write, and that torch.optim.Adam runs: the weights must be those of the plain loop."""

from __future__ import annotations

import copy
import gc
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from ivon_lora import IVON, VAdam
from tests.two_processes import Pool

X, Y = torch.randn(16, 4, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 3
STEPS = 14  # the noise begins at the eleventh

Loop = Callable[[nn.Module, Any], Any]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def vadam(model: nn.Module, **options: Any) -> VAdam:
    optimizer = VAdam(model.parameters(), **{"lr": 1e-2, "num_examples": 64, **options})
    optimizer.attach(model)
    return optimizer


def fixed(model: nn.Module) -> IVON:
    """At learning rate 0 the mean must stay where it is, under noise of 0.1."""
    optimizer = IVON(model.parameters(), lr=0.0, ess=100)
    optimizer.attach(model)
    return optimizer


def loss_of(model: nn.Module, rows: slice = slice(None)) -> Tensor:
    return F.cross_entropy(model(X[rows]), Y[rows])


def finish(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def plain(model: nn.Module, optimizer: Any) -> None:
    loss_of(model).backward()
    finish(optimizer)


def train(step: Loop, steps: int = STEPS, make: Callable[[nn.Module], Any] = vadam) -> Tensor:
    model = net()
    optimizer = make(model)
    for _ in range(steps):
        step(model, optimizer)
    return weights(model)


# ---------------------------------------------------------------- what must change nothing


def between(disturb: Loop) -> Loop:
    """Between a forward and its backward."""

    def step(model: nn.Module, optimizer: Any) -> None:
        loss = loss_of(model)
        disturb(model, optimizer)
        loss.backward()
        finish(optimizer)

    return step


def before_step(disturb: Loop) -> Loop:
    """Between a backward and the step."""

    def step(model: nn.Module, optimizer: Any) -> None:
        loss = loss_of(model)
        loss.backward()
        disturb(model, optimizer)
        finish(optimizer)

    return step


def reference_pass(model: nn.Module, optimizer: Any) -> None:
    with torch.no_grad():
        model(X)


def evaluation(model: nn.Module, optimizer: Any) -> None:
    model.eval()
    with torch.inference_mode():
        model(X)
    model.train()


def state_dict(model: nn.Module, optimizer: Any) -> None:
    model.state_dict()


def copied(model: nn.Module, optimizer: Any) -> None:
    copy.deepcopy(model.eval())
    model.train()


def ema_swap(model: nn.Module, optimizer: Any) -> None:
    model.eval()
    stored = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.data.copy_(torch.zeros_like(p))
    with torch.no_grad():
        assert not model(X).any()
    for p, value in zip(model.parameters(), stored, strict=True):
        p.data.copy_(value)
    model.train()


def state_dict_in_a_backward_hook(model: nn.Module, optimizer: Any) -> None:
    mean = []
    handle = model[1].register_full_backward_hook(lambda *_: mean.append(copy.deepcopy(model.state_dict())))
    loss_of(model).backward()
    handle.remove()
    finish_at = [optimizer.posterior(p).mean for p in model.parameters()] if isinstance(optimizer, IVON) else []
    assert all(map(torch.equal, mean[0].values(), finish_at))
    finish(optimizer)


def zero_grad_after_forward(model: nn.Module, optimizer: Any) -> None:
    loss = loss_of(model)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def retain_graph_twice(model: nn.Module, optimizer: Any) -> None:
    loss = loss_of(model) * 0.5
    loss.backward(retain_graph=True)
    evaluation(model, optimizer)
    loss.backward()
    finish(optimizer)


def out_of_memory(model: nn.Module, optimizer: Any) -> None:
    """Once in the forward, once in the backward; then the batch is tried again."""

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    for register in (model[2].register_forward_pre_hook, model[1].register_full_backward_hook):
        handle = register(fail)
        try:
            loss_of(model).backward()
        except torch.OutOfMemoryError:
            optimizer.zero_grad()
        handle.remove()
    plain(model, optimizer)


def skipped_micro_batch(model: nn.Module, optimizer: Any) -> None:
    for n in range(3):
        loss = loss_of(model) * float("nan" if n == 1 else 0.5)
        if torch.isfinite(loss):
            loss.backward()
    finish(optimizer)


def skipped_by_the_scaler(model: nn.Module, optimizer: Any) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for spoiled in (True, False):
        scaler.scale(loss_of(model)).backward()
        if spoiled:
            model[0].weight.grad[0, 0] = float("nan")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


def checkpointed(reentrant: bool) -> Loop:
    def step(model: nn.Module, optimizer: Any) -> None:
        x = X.clone().requires_grad_()
        F.cross_entropy(checkpoint(model, x, use_reentrant=reentrant), Y).backward()
        finish(optimizer)

    return step


def another_default_dtype(model: nn.Module, optimizer: Any) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        plain(model, optimizer)
    finally:
        torch.set_default_dtype(torch.float32)


def through_functional_call(model: nn.Module, optimizer: Any) -> None:
    F.cross_entropy(functional_call(model, dict(model.named_parameters()), (X,)), Y).backward()
    finish(optimizer)


def attack(model: nn.Module, optimizer: Any) -> None:
    """Adversarial examples: gradients for the inputs only."""
    x = X.clone().requires_grad_()
    torch.autograd.grad(F.cross_entropy(model(x), Y), x)
    plain(model, optimizer)


def attack_in_eval_mode(model: nn.Module, optimizer: Any) -> None:
    model.eval()
    attack_x = X.clone().requires_grad_()
    torch.autograd.grad(F.cross_entropy(model(attack_x), Y), attack_x)
    model.train()
    plain(model, optimizer)


UNDISTURBED: dict[str, Loop] = {
    "reference pass": between(reference_pass),
    "reference pass after the backward": before_step(reference_pass),
    "evaluation": between(evaluation),
    "evaluation after the backward": before_step(evaluation),
    "state_dict": between(state_dict),
    "state_dict after the backward": before_step(state_dict),
    "deepcopy in eval mode": between(copied),
    "swapped with an average": between(ema_swap),
    "swapped with an average after the backward": before_step(ema_swap),
    "state_dict in a backward hook": state_dict_in_a_backward_hook,
    "zero_grad between forward and backward": zero_grad_after_forward,
    "one graph, two backwards": retain_graph_twice,
    "out of memory": out_of_memory,
    "skipped micro-batch": skipped_micro_batch,
    "step skipped by the scaler": skipped_by_the_scaler,
    "reentrant checkpoint": checkpointed(True),
    "checkpoint": checkpointed(False),
    "another default dtype": another_default_dtype,
    "functional_call": through_functional_call,
    "adversarial examples": attack,
    "adversarial examples in eval mode": attack_in_eval_mode,
}


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, Tensor]:
    return {"vadam": train(plain), "adam": train(plain, make=lambda model: torch.optim.Adam(model.parameters(), 1e-2))}


@pytest.mark.parametrize("loop", UNDISTURBED.values(), ids=list(UNDISTURBED))
def test_nothing_is_disturbed(loop: Loop, undisturbed: dict[str, Tensor]) -> None:
    assert torch.equal(train(loop), undisturbed["vadam"])
