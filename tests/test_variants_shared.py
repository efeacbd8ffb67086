"""The shared parts of `ivon_lora.variants`: gates, ranks at rest, the orthogonality penalty, mean gradients."""

from typing import Any

import pytest
import torch

from ivon_lora import VAdam, find_adapters
from ivon_lora.variants.gradients import step_sizes
from ivon_lora.variants.resting import Resting, tensors_of
from ivon_lora.variants.rm_lora import penalty_gradient
from tests.variant_problem import loss_of, start_lora


def test_gradients_of_the_penalty_are_those_of_the_equation_and_zero_for_orthonormal_ranks() -> None:
    for dim, shape in ((0, (4, 8)), (1, (8, 4))):
        value = torch.randn(shape, dtype=torch.float64)
        m = value.movedim(dim, 0)
        by_hand = 2 * (m @ m.T - torch.eye(4)) @ m / torch.linalg.norm(m @ m.T - torch.eye(4))
        torch.testing.assert_close(penalty_gradient(value, dim), by_hand.movedim(0, dim))
    assert not penalty_gradient(torch.eye(4, 8, dtype=torch.bfloat16), 0).any()


@pytest.mark.parametrize("name", ["sgd", "adamw", "vadam"])
def test_a_rank_at_rest_keeps_its_weights_and_all_that_is_known_of_it(name: str) -> None:
    run = start_lora(name)
    if name == "sgd":
        run.optimizer.param_groups[0]["momentum"] = 0.9
    run.train(12)
    b, rests = find_adapters(run.model)[0].B, torch.tensor([True, False, True, False])
    before = {n: value.clone() for n, value in tensors_of(run.optimizer, b).items()}
    resting = Resting(run.optimizer)
    loss_of(run.model).backward()
    resting.hold([(b, 1, rests)])
    run.optimizer.step()
    resting.release()
    after = tensors_of(run.optimizer, b)
    assert after.keys() == before.keys() > {""}
    for n, value in before.items():
        assert torch.equal(after[n][:, rests], value[:, rests])
        assert (after[n][:, ~rests] != value[:, ~rests]).all()


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
