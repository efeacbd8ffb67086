"""Parameters over one memory are one parameter: the trajectory is that of the model in which they are one tensor."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ivon_lora import IVON, VAdam

X = torch.linspace(-1.0, 1.0, 15).reshape(3, 5)


class Tied(nn.Module):
    """x -> (x W) W^T, with two parameters over the memory of W, or with W itself."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.linspace(-0.4, 0.5, 20).reshape(5, 4))
        self.up = nn.Parameter(self.down.data.t()) if tied else None

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.down @ (self.down.t() if self.up is None else self.up)


def make(kind: type[IVON], model: nn.Module) -> IVON:
    if kind is VAdam:
        return VAdam(model.parameters(), lr=1e-2, num_examples=30, batch_size=3)
    return IVON(model.parameters(), lr=0.1, ess=30.0, weight_decay=1e-2)


def plain(model: nn.Module, optimizer: IVON) -> None:
    with optimizer.sampled_params(train=True):
        model(X).square().sum().backward()


def several_samples(model: nn.Module, optimizer: IVON) -> None:
    for _ in range(3):
        plain(model, optimizer)


def evaluation_before_backward(model: nn.Module, optimizer: IVON) -> None:
    loss = model(X).square().sum()
    model.eval()
    with torch.no_grad():
        model(X)
    model.train()
    loss.backward()


@pytest.mark.parametrize("loop", [plain, several_samples, evaluation_before_backward])
@pytest.mark.parametrize("kind", [IVON, VAdam])
def test_two_parameters_over_one_memory_are_one(kind: type[IVON], loop: Callable[[nn.Module, IVON], None]) -> None:
    found = []
    for tied in (True, False):
        model = Tied(tied)
        optimizer = make(kind, model)
        if loop is evaluation_before_backward:
            optimizer.attach(model)
        for _ in range(14):  # VAdam's first ten draw no noise
            loop(model, optimizer)
            optimizer.step()
            optimizer.zero_grad()
        optimizer.eval()
        found.append((model.down.detach().clone(), optimizer.state[model.down]["hess"].clone()))
        if model.up is not None:
            assert model.up.data_ptr() == model.down.data_ptr()
            assert model.up not in optimizer.state
            torch.testing.assert_close(model.up.detach(), model.down.detach().t(), rtol=0, atol=0)
    for mine, single in zip(*found, strict=True):  # the sum of two gradients is rounded once in both
        torch.testing.assert_close(mine, single, rtol=0, atol=0)


def test_a_piece_of_another_parameter_is_refused() -> None:
    whole = nn.Parameter(torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"shapes \(4, 3\) and \(2, 3\) share memory"):
        IVON([whole, nn.Parameter(whole.data[:2])], lr=0.1, ess=10.0)
