"""Modes of torch and arguments that people pass, in the middle of a run or before it."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from ivon_lora import VAdam
from tests.loop_problem import STEPS, X, Y, finish, fixed, loss_of, net, plain, train, undisturbed, vadam, weights


@pytest.mark.parametrize("what", ["step", "training step"])
@pytest.mark.filterwarnings("ignore:.*grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own
def test_compiled(what: str) -> None:
    compiled = functools.partial(torch.compile, backend="eager")
    model = net()
    optimizer = vadam(model)

    def update() -> None:
        finish(optimizer)

    end = compiled(update) if what == "step" else update

    def training_step() -> None:
        loss_of(model).backward()
        end()

    run = compiled(training_step) if what == "training step" else training_step
    for _ in range(STEPS):
        run()
    torch._dynamo.reset()
    torch.testing.assert_close(weights(model), undisturbed(), rtol=0, atol=1e-6)


def test_lazy_parameters() -> None:
    model = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(3))
    optimizer = vadam(model)
    for _ in range(STEPS):
        plain(model, optimizer)
    assert all(optimizer.state[p]["step"] == STEPS for p in model.parameters())
    model(X)
    assert optimizer.is_sampled
    assert not torch.equal(
        weights(model), torch.cat([optimizer.posterior(p).mean.flatten() for p in model.parameters()])
    )


@pytest.mark.parametrize("to", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("moment", ["before the first step", "between steps", "before a step"])
def test_cast_in_the_middle_of_a_run(moment: str, to: torch.dtype) -> None:
    """As near to the run in fp32 as the new precision tells."""

    def step(model: Any, optimizer: Any, cast: bool = False) -> None:
        if cast and moment == "between steps":
            model.to(to)
        F.cross_entropy(model(X.to(model[0].weight.dtype)), Y).backward()
        if cast and moment == "before a step":
            model.to(to)
        finish(optimizer)

    model, other = net(), net()
    optimizer, reference = vadam(model), vadam(other)
    if moment == "before the first step":
        model.to(to)
    for n in range(STEPS + 2):
        step(model, optimizer, cast=n == STEPS)
        step(other, reference)
    assert all(p.dtype == to for p in model.parameters())
    assert all(torch.equal(p, optimizer.posterior(p).mean.to(to)) for p in model.parameters())
    tolerance = 1e-2 if to == torch.bfloat16 else 1e-6
    torch.testing.assert_close(weights(model).float(), weights(other), rtol=0, atol=tolerance)


@pytest.mark.parametrize("value", [float, lambda step: torch.tensor([int(step)])], ids=["number", "integers"])
@pytest.mark.parametrize("where", ["in a state dict", "in the state"])
def test_a_step_that_is_a_number(where: str, value: Callable[[Tensor], Any]) -> None:
    def step(model: Any, optimizer: Any) -> None:
        saved = optimizer.state_dict()
        for entry in saved["state"].values():
            entry["step"] = value(entry["step"])
        if where == "in a state dict":
            optimizer.load_state_dict(saved)
        else:
            for p, entry in zip(model.parameters(), saved["state"].values(), strict=False):
                optimizer.state[p]["step"] = float(entry["step"])
        plain(model, optimizer)

    assert torch.equal(train(step), undisturbed())


def test_a_quantised_base_beside_what_is_trained() -> None:
    """Packed integers and complex numbers, frozen."""
    model = net()
    frozen = [torch.randint(0, 255, (3, 8), dtype=torch.uint8), torch.ones(3, dtype=torch.complex64)]
    for name, values in zip(("packed", "rotary"), frozen, strict=True):
        model[2].register_parameter(name, nn.Parameter(values, requires_grad=False))
    optimizer = vadam(model)
    for _ in range(STEPS):
        plain(model, optimizer)
    assert torch.equal(torch.cat([p.flatten() for p in model.parameters() if p.requires_grad]), undisturbed())
    assert torch.equal(optimizer.posterior(model[2].packed).mean, frozen[0].float())
    assert not optimizer.posterior(model[2].packed).stddev.any()
    with pytest.raises(ValueError, match="frozen and has never been updated"):
        optimizer.snr(model[2].packed)
    assert model[2].packed not in optimizer.state


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_an_attached_model_can_be_exported(training: bool, strict: bool) -> None:
    model = net().train(training)
    optimizer, before = fixed(model), weights(model)
    exported = torch.export.export(model, (X,), strict=strict).module()
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model.eval()(X)
        torch.testing.assert_close(exported(X), expected)
    assert torch.equal(weights(model), before)
    plain(model.train(), optimizer)
    assert optimizer.completed_steps == 1


def test_without_values_a_model_runs_and_a_step_is_refused_in_words() -> None:
    with FakeTensorMode():
        model = net()
        optimizer = vadam(model)
        F.cross_entropy(model(torch.randn(16, 4)), torch.zeros(16, dtype=torch.long)).backward()
        with pytest.raises(RuntimeError, match="FakeTensorMode is on"):
            optimizer.step()


def test_what_a_tracer_writes_down_has_nothing_of_the_optimizer() -> None:
    model = net()
    optimizer, before = fixed(model), weights(model)
    traced = make_fx(lambda x: model(x))(X)
    assert not optimizer.is_sampled
    assert torch.equal(weights(model), before)
    torch.testing.assert_close(traced(X), net()(X))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is:DeprecationWarning")
def test_an_attached_model_refuses_to_be_scripted_in_words() -> None:
    model = net()
    optimizer = VAdam(model.parameters(), num_examples=64)
    handle = optimizer.attach(model)
    with pytest.raises(RuntimeError, match=r"call remove\(\)"):
        torch.jit.script(model)
    handle.remove()
    torch.testing.assert_close(torch.jit.script(model)(X), model(X))
