"""Five hundred random loops: what happens beside the training steps changes no bit of the weights.

A loop draws its model (shapes, strides, dtypes, frozen tensors, groups), its optimizer and its schedule (accumulation,
skipped steps, tensors frozen and thawed on the way). It is run twice: bare, and with disturbances at random places.
"""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from ivon_lora import IVON, VAdam

LOOPS, IN_ONE_TEST, STEPS = 500, 50, 5
STRIDES: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x,
    lambda x: x.t().contiguous().t(),
    lambda x: torch.stack([x, x], -1)[..., 0],  # every second element of its memory
)


class Model(nn.Module):
    """Layers of odd widths; no two runs of a forward differ."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        dtype = draw.choice([torch.float32, torch.float32, torch.bfloat16, torch.float64])
        widths = [draw.choice([1, 2, 3, 5, 7, 17]) for _ in range(draw.randint(2, 4))]
        generator = torch.Generator().manual_seed(draw.randrange(10**6))
        self.weights = nn.ParameterList()
        for rows, columns in pairwise(widths):
            values = torch.randn(rows, columns, generator=generator).to(dtype)
            self.weights.append(nn.Parameter(draw.choice(STRIDES)(values)))
        self.scale = nn.Parameter(torch.tensor(1.0, dtype=dtype))
        self.x = torch.randn(4, widths[0], generator=generator).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = torch.tanh(x @ weight)
        return (x * self.scale).square().mean()


def make_optimizer(draw: random.Random, model: Model) -> IVON:
    groups: list[dict[str, object]] = [{"params": list(model.weights)}, {"params": [model.scale], "lr": 0.02}]
    params = groups if draw.random() < 0.5 else list(model.parameters())
    backend = draw.choice(["auto", "eager"])
    if draw.random() < 0.5:
        return VAdam(params, lr=0.01, num_examples=8, batch_size="auto" if draw.random() < 0.5 else 4, backend=backend)
    return IVON(params, lr=0.1, ess=50.0, hess_approx=draw.choice(["price", "gradsq"]), sync=False, backend=backend)


def evaluate(model: Model, optimizer: IVON) -> None:
    model.eval()
    with torch.no_grad():
        model(model.x)
    model.train()


def look(model: Model, optimizer: IVON) -> None:
    with torch.no_grad():
        model(model.x)


def save(model: Model, optimizer: IVON) -> None:
    torch.save((model.state_dict(), optimizer.state_dict()), io.BytesIO())


def read(model: Model, optimizer: IVON) -> None:
    optimizer.posterior(model.scale), optimizer.snr(model.scale), optimizer.metrics()


def predict(model: Model, optimizer: IVON) -> None:
    """A context that an exception leaves; only where no graph is open and no gradient waits."""
    with pytest.raises(KeyError), optimizer.sampled_params(), torch.no_grad():
        raise KeyError


def duplicate(model: Model, optimizer: IVON) -> None:
    copy.deepcopy(optimizer)


ANYWHERE = (evaluate, look, save, read, duplicate)


def run(seed: int, disturbed: bool) -> list[Tensor]:
    """The mean and the Hessian of every parameter after a loop."""
    draw, other = random.Random(seed), random.Random(-seed - 1)
    model = Model(draw)
    optimizer = make_optimizer(draw, model)
    optimizer.attach(model)

    def disturb(*more: Callable[[Model, IVON], None]) -> None:
        if disturbed and other.random() < 0.5:
            other.choice((*ANYWHERE, *more))(model, optimizer)

    for _ in range(STEPS):
        changed = draw.choice(list(model.weights)) if len(model.weights) > 1 and draw.random() < 0.2 else None
        if changed is not None:
            changed.requires_grad_(not changed.requires_grad)
        disturb(predict)
        for part in range(draw.choice([1, 1, 2])):
            loss = model(model.x[2 * part : 2 * part + 2])
            disturb()
            loss.backward()
            disturb()
        if draw.random() < 0.8:
            optimizer.step()
        optimizer.zero_grad(set_to_none=draw.random() < 0.7)
        disturb(predict)
    optimizer.eval()
    hess = [optimizer.state[p]["hess"] for p in model.parameters() if "hess" in optimizer.state.get(p, {})]
    return [p.detach().clone() for p in model.parameters()] + hess


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("first", range(0, LOOPS, IN_ONE_TEST))
def test_what_happens_beside_the_steps_changes_nothing(first: int) -> None:
    for seed in range(first, first + IN_ONE_TEST):
        for bare, disturbed in zip(run(seed, False), run(seed, True), strict=True):
            assert torch.equal(bare, disturbed), f"loop {seed}"
