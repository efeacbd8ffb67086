"""What people expect of any torch optimizer: every learning-rate scheduler, hooks, compiled models."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as schedulers

from ivon_lora import IVON, VAdam
from tests.loop_problem import X, net, plain, weights
from tests.optimizer_problem import equal, make_params, train_step, values

STEPS = 6
HYPER: dict[str, Any] = {"ess": 50.0, "beta2": 0.9, "weight_decay": 1e-3}

KINDS: dict[str, Callable[[IVON], Any]] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda t: 1 / (1 + t)),
    "StepLR": lambda o: schedulers.StepLR(o, 2),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, STEPS),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, factor=0.5, patience=0),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.2, total_steps=STEPS + 1, cycle_momentum=False),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=2), schedulers.ExponentialLR(o, 0.5)], [2]
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_scheduler_equals_writing_its_learning_rates(kind: str) -> None:
    params, others = make_params(), make_params()
    optimizer = IVON(params, lr=torch.tensor(0.1) if kind in ("StepLR", "OneCycleLR") else 0.1, **HYPER)
    by_hand = IVON(others, lr=0.1, **HYPER)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # SequentialLR of torch itself steps in the wrong order
        scheduler = KINDS[kind](optimizer)
    rates = []
    for step in range(STEPS):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        by_hand.param_groups[0]["lr"] = rates[-1]
        loss = train_step(optimizer, params, step)
        train_step(by_hand, others, step)
        if kind == "ReduceLROnPlateau":
            scheduler.step(1.0 + 0 * loss)
        else:
            scheduler.step()
    assert len(set(rates)) > 1
    assert equal(params, others)


def test_step_hooks_of_torch_run_once_around_the_update() -> None:
    """A pre hook sees the sample, a post hook the mean; also where both classes, which torch wraps, are in use."""
    VAdam(make_params(), num_examples=10)
    params = make_params()
    optimizer = IVON(params, lr=0.1, **HYPER)
    seen: list[bool] = []
    mean = values(params)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(equal(params, mean)))
    optimizer.register_step_post_hook(
        lambda o, args, kwargs: seen.append(equal(params, [optimizer.posterior(p).mean for p in params]))
    )
    train_step(optimizer, params, 0)
    assert seen == [False, True]


@pytest.mark.parametrize("hooks_are_compiled", [True, False])
def test_compiled_model_is_compiled_once_per_mode(hooks_are_compiled: bool) -> None:
    """The hooks are left out of the graph of the module they are on, or are on the compiled module, outside of it."""
    traced: list[bool] = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        traced.append(torch.is_grad_enabled())
        return graph.forward

    def trained(compiled: bool) -> torch.Tensor:
        model = net()
        optimizer = IVON(model.parameters(), lr=0.1, **HYPER)
        called: Any = model
        if compiled:
            called = torch.compile(model, backend=count, fullgraph=not hooks_are_compiled)
        optimizer.attach(model if hooks_are_compiled else called)
        for step in range(3):
            plain(called.train(), optimizer)
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
            called.eval()
            with torch.no_grad():
                called(X)
        return weights(model)

    torch._dynamo.reset()
    try:
        assert torch.equal(trained(compiled=True), trained(compiled=False))
        assert traced == [True, False]
    finally:
        torch._dynamo.reset()
