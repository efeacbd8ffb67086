"""The shared parts of `ivon_lora.variants`: gates, ranks at rest, the orthogonality penalty, mean gradients."""

from typing import Any

import pytest
import torch

from ivon_lora import VAdam, find_adapters
from ivon_lora.variants.gradients import step_sizes
from ivon_lora.variants.orthogonality import penalty_gradient
from ivon_lora.variants.resting import Resting
from tests.variant_problem import ROWS, loss_of, make_model


def trained(model: Any, optimizer: Any, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


def test_gradients_of_the_penalty_are_those_of_the_equation_and_zero_for_orthonormal_ranks() -> None:
    for dim, shape in ((0, (4, 8)), (1, (8, 4))):
        value = torch.randn(shape, dtype=torch.float64)
        m = value.movedim(dim, 0)
        by_hand = 2 * (m @ m.T - torch.eye(4)) @ m / torch.linalg.norm(m @ m.T - torch.eye(4))
        torch.testing.assert_close(penalty_gradient(value, dim), by_hand.movedim(0, dim))
    assert not penalty_gradient(torch.eye(4, 8, dtype=torch.bfloat16), 0).any()


@pytest.mark.parametrize("name", ["sgd", "adamw", "vadam"])
def test_a_rank_at_rest_keeps_its_weights_and_all_that_is_known_of_it(name: str) -> None:
    model = make_model()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer: Any = {
        "sgd": lambda: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        "adamw": lambda: torch.optim.AdamW(params, lr=0.01),
        "vadam": lambda: VAdam(params, lr=0.01, num_examples=100, batch_size=ROWS),
    }[name]()
    if name == "vadam":
        optimizer.attach(model)
    trained(model, optimizer, 12)
    adapter = find_adapters(model)[0]
    rests = torch.tensor([True, False, True, False])
    state = {
        n: v.clone() for n, v in optimizer.state[adapter.B].items() if torch.is_tensor(v) and v.shape == adapter.B.shape
    }
    before = adapter.B.detach().clone()
    resting = Resting(optimizer)
    loss_of(model).backward()
    resting.hold([(adapter.B, 1, rests)])
    optimizer.step()
    resting.release()
    assert torch.equal(adapter.B[:, rests], before[:, rests])
    assert not torch.isclose(adapter.B[:, ~rests], before[:, ~rests], rtol=0, atol=0).any()
    assert state
    for key, value in state.items():
        assert torch.equal(optimizer.state[adapter.B][key][:, rests], value[:, rests])
        assert not torch.equal(optimizer.state[adapter.B][key], value)


def test_step_sizes_are_those_of_the_optimizers() -> None:
    p = torch.nn.Parameter(torch.zeros(5))
    p.grad = torch.tensor([1.0, -2.0, 0.5, 3.0, 1e-3])
    for make in (
        lambda: torch.optim.SGD([p], lr=0.1),
        lambda: torch.optim.Adam([p], lr=0.1),
        lambda: VAdam([p], lr=0.1, num_examples=100, batch_size=4, lr_limit=None),
    ):
        p.data.zero_()
        optimizer: Any = make()
        if isinstance(optimizer, VAdam):
            optimizer.train()
        optimizer.step()
        torch.testing.assert_close(p.detach(), -step_sizes(optimizer, p) * p.grad, atol=1e-7, rtol=1e-4)
