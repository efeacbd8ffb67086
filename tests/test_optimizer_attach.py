"""`attach`: an unchanged AdamW loop trains with samples, and no saved model holds one."""

import copy

import pytest
import torch
from torch import nn

from ivon_lora import IVON
from tests.loop_problem import X, fixed, loss_of, net, plain, weights


def test_plain_loop_trains_and_equals_the_explicit_one() -> None:
    model, other = net(), net()
    optimizer, explicit = (IVON(m.parameters(), lr=0.5, ess=500.0, beta2=0.999) for m in (model, other))
    optimizer.attach(model)
    first = loss_of(model).item()
    for _ in range(120):
        plain(model, optimizer)
        explicit.train()
        plain(other, explicit)
    assert torch.equal(weights(model), weights(other))
    model.eval()
    assert loss_of(model).item() < 0.7 * first


def test_training_forward_samples_and_evaluation_forward_restores() -> None:
    model = net()
    optimizer, mean = fixed(model), weights(model)

    def holds_mean() -> bool:
        assert optimizer.is_sampled != torch.equal(weights(model), mean)
        return not optimizer.is_sampled

    assert holds_mean()
    model(X)
    assert not holds_mean()
    with torch.no_grad():
        model(X)  # training mode, but nothing to learn from
    assert holds_mean()
    model(X)
    with torch.inference_mode():
        model(X)
    assert holds_mean()
    model(X)
    model.eval()
    model(X)
    assert holds_mean()


@pytest.mark.parametrize("what", ["model", "submodule", "leaf", "wrapper", "optimizer first"])
def test_state_dict_never_holds_a_sample(what: str) -> None:
    model = nn.Sequential(*net()[:2], nn.Sequential(net()[2]))
    mean = copy.deepcopy(model.state_dict())
    optimizer, before = fixed(model), weights(model)
    model(X)
    assert not torch.equal(weights(model), before)
    if what == "optimizer first":
        optimizer.state_dict()
    wrapper = nn.ModuleDict({"inner": model})
    saved, prefix = {"submodule": (model[2], "2."), "leaf": (model[0], "0.")}.get(what, (model, ""))
    state_dict = (wrapper if what == "wrapper" else saved).state_dict()
    assert all(torch.equal(value, mean[prefix + key.removeprefix("inner.")]) for key, value in state_dict.items())
    assert torch.equal(weights(model), before)


def test_a_copy_gives_its_sample_back_where_the_original_does() -> None:
    model = net()
    optimizer, before = fixed(model), weights(model)
    loss_of(model).backward()
    copied = copy.deepcopy((model, optimizer))
    for mine, its in ((model, optimizer), copied):
        assert not torch.equal(weights(mine), before)
        its.zero_grad()
        assert torch.equal(weights(mine), before)


def test_load_state_dict_of_the_model_while_sampled_wins() -> None:
    model = net()
    optimizer = fixed(model)
    model(X)
    new = {k: torch.randn_like(v) for k, v in copy.deepcopy(model.state_dict()).items()}
    model(X)
    assert optimizer.is_sampled
    model.load_state_dict(new)
    model.eval()(X)
    assert all(torch.equal(v, new[k]) for k, v in model.state_dict().items())


def test_remove() -> None:
    model = net()
    before = weights(model)
    optimizer = IVON(model.parameters(), lr=0.1, ess=500.0)
    handle = optimizer.attach(model)
    model(X).sum().backward()
    assert not torch.equal(weights(model), before)
    handle.remove()
    handle.remove()
    assert torch.equal(weights(model), before)
    model(X)
    assert torch.equal(weights(model), before)
    optimizer.train()
    sample = torch.cat([v.flatten() for v in model.state_dict().values()])
    assert torch.equal(sample, weights(model)), "the guard is off"
    assert not torch.equal(sample, before)
    optimizer.eval()
    assert not model._forward_pre_hooks
    assert all(not m._state_dict_pre_hooks for m in model.modules())


def test_prediction_contexts_reach_an_attached_model_in_eval_mode() -> None:
    """Inside `sampled_params` the hooks must leave the sample alone, or an ensemble predicts the mean n times."""
    model = net()
    optimizer = fixed(model)
    model.eval()
    with torch.no_grad():
        at_mean = model(X)
        outputs = []
        for _ in range(2):
            with optimizer.sampled_params():
                outputs.append(model(X))
        assert not torch.equal(outputs[0], at_mean)
        assert not torch.equal(outputs[0], outputs[1])
        assert torch.equal(model(X), at_mean)


def test_a_copy_of_an_attached_model_leaves_the_original_alone() -> None:
    model = net()
    optimizer, mean = fixed(model), weights(model)
    twin = copy.deepcopy(model)
    twin(X)
    assert torch.equal(weights(model), mean)
    model(X)
    twin.eval()(X)
    assert optimizer.is_sampled
    assert not torch.equal(weights(model), mean)
