"""Every method on a GPU: it trains as on the CPU, goes on from a checkpoint, and leaves a plain adapter."""

from typing import Any, cast

import pytest
import torch

from ivon_lora.variants import METHODS
from tests.variant_problem import CASES, RATES, make_data, make_model, make_optimizer

DEVICE = "cuda"


def train(method: str, optimizer: str, device: str) -> tuple[list[float], Any, Any]:
    x, y = (t.to(device) for t in make_data())
    model = make_model().to(device)
    variant = METHODS[method](
        model, **CASES[method].options, **cast(Any, {"total_steps": 16} if CASES[method].needs_steps else {})
    )
    made = make_optimizer(optimizer, variant.param_groups(), RATES[optimizer], model)
    variant.attach(made)
    losses = []
    for _ in range(16):
        made.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        made.step()
        losses.append(float(loss.detach()))
    return losses, variant, made


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "vadam", "ivon"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_it_trains_as_on_the_cpu(method: str, optimizer: str) -> None:
    losses, variant, made = train(method, optimizer, DEVICE)
    made.load_state_dict(made.state_dict())
    assert losses == pytest.approx(train(method, optimizer, "cpu")[0], rel=1e-2, abs=1e-4)
    model, x = variant.model.eval(), make_data()[0].to(DEVICE)
    before = model(x)
    variant.detach()
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-4)
