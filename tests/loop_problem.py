"""A network of three layers, the plain loop around it, and loops that are to end at the same weights."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ivon_lora import IVON, VAdam

X, Y = torch.randn(16, 4, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 3
STEPS = 14  # the noise begins at the eleventh

#: one step of a model and its optimizer
Loop = Callable[[Any, Any], Any]


def net() -> Any:
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


def loss_of(model: Any, rows: slice = slice(None)) -> Tensor:
    return F.cross_entropy(model(X[rows]), Y[rows])


def finish(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def plain(model: Any, optimizer: Any) -> None:
    loss_of(model).backward()
    finish(optimizer)


def train(step: Loop, steps: int = STEPS, make: Callable[[nn.Module], Any] = vadam) -> Tensor:
    model = net()
    optimizer = make(model)
    for _ in range(steps):
        step(model, optimizer)
    return weights(model)


@functools.cache
def undisturbed() -> Tensor:
    return train(plain)


def prediction(model: Any, optimizer: Any) -> None:
    """At a sample of its own, also while a graph is open."""
    with torch.inference_mode(), optimizer.sampled_params():
        model(X)


def skipped_by_the_scaler(model: Any, optimizer: Any) -> None:
    """The step of a gradient that overflows, then one that is made."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for spoiled in (True, False):
        scaler.scale(loss_of(model)).backward()
        if spoiled:
            model[0].weight.grad[0, 0] = float("nan")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
