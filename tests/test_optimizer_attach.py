"""`attach`: an unchanged AdamW loop trains with samples, and no saved model holds one."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ivon_lora import IVON
from tests.optimizer_problem import equal, photo, same_photo, values

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
Y = X @ torch.randn(6, 2, generator=torch.Generator().manual_seed(2))


def make_model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Sequential(nn.Linear(8, 2)))


def make_optimizer(model: nn.Module) -> IVON:
    return IVON(model.parameters(), lr=0.1, ess=500.0, beta2=0.999)


def adamw_loop(optimizer: torch.optim.Optimizer, model: nn.Module, steps: int) -> None:
    """A loop that knows nothing of samples."""
    for _ in range(steps):
        model.train()
        optimizer.zero_grad()
        F.mse_loss(model(X), Y).backward()
        optimizer.step()


def attached(steps: int = 0) -> tuple[nn.Sequential, IVON]:
    """A model and its optimizer after some steps of that loop."""
    model = make_model()
    optimizer = make_optimizer(model)
    optimizer.attach(model)
    adamw_loop(optimizer, model, steps)
    return model, optimizer


def means(optimizer: IVON, model: nn.Module) -> list[Tensor]:
    return [optimizer.posterior(p).mean for p in model.parameters()]


def holds_mean(optimizer: IVON, model: nn.Module) -> bool:
    return equal(list(model.parameters()), means(optimizer, model))


def test_plain_loop_trains_and_equals_the_explicit_one() -> None:
    model, other = make_model(), make_model()
    optimizer, explicit = make_optimizer(model), make_optimizer(other)
    optimizer.attach(model)
    first = F.mse_loss(model(X), Y).item()
    adamw_loop(optimizer, model, 120)
    for _ in range(120):
        explicit.train()
        explicit.zero_grad()
        F.mse_loss(other(X), Y).backward()
        explicit.step()
    assert same_photo(photo(optimizer), photo(explicit))
    model.eval()
    assert F.mse_loss(model(X), Y).item() < 0.1 * first


def test_training_forward_samples_and_evaluation_forward_restores() -> None:
    model, optimizer = attached(steps=2)
    assert holds_mean(optimizer, model)
    model(X)
    assert not holds_mean(optimizer, model)
    with torch.no_grad():
        model(X)  # training mode, but nothing to learn from
    assert holds_mean(optimizer, model)
    model(X)
    with torch.inference_mode():
        model(X)
    assert holds_mean(optimizer, model)
    model(X)
    model.eval()
    model(X)
    assert holds_mean(optimizer, model)


@pytest.mark.parametrize("what", ["model", "submodule", "leaf", "wrapper", "optimizer first"])
def test_state_dict_never_holds_a_sample(what: str) -> None:
    model, optimizer = attached(steps=2)
    wrapper = nn.ModuleDict({"inner": model})
    mean = {k: v.clone() for k, v in model.state_dict().items()}
    model(X)
    assert not holds_mean(optimizer, model)
    if what == "optimizer first":
        optimizer.state_dict()
    saved, prefix = {
        "model": (model, ""),
        "submodule": (model[2], "2."),
        "leaf": (model[0], "0."),
        "wrapper": (wrapper, "inner."),
        "optimizer first": (model, ""),
    }[what]
    state_dict = saved.state_dict()
    for key, value in state_dict.items():
        full = key.removeprefix(prefix) if what == "wrapper" else prefix + key
        assert torch.equal(value, mean[full])
    assert holds_mean(optimizer, model)


def test_load_state_dict_of_the_model_while_sampled_wins() -> None:
    model, _ = attached()
    model(X)
    new = {k: torch.randn_like(v) for k, v in copy.deepcopy(model.state_dict()).items()}
    model(X)
    model.load_state_dict(new)
    model.eval()(X)
    assert all(torch.equal(v, new[k]) for k, v in model.state_dict().items())


def test_remove() -> None:
    model = make_model()
    optimizer = make_optimizer(model)
    handle = optimizer.attach(model)
    before = values(list(model.parameters()))
    model(X).sum().backward()
    assert not equal(list(model.parameters()), before)
    handle.remove()
    handle.remove()
    assert equal(list(model.parameters()), before)
    model(X)
    assert equal(list(model.parameters()), before)
    optimizer.train()
    sample = values(list(model.parameters()))
    assert all(torch.equal(v, s) for v, s in zip(model.state_dict().values(), sample, strict=True)), "the guard is off"
    optimizer.eval()
    assert not model._forward_pre_hooks
    assert all(not m._state_dict_pre_hooks for m in model.modules())


def test_prediction_contexts_reach_an_attached_model_in_eval_mode() -> None:
    """Inside `sampled_params` the hooks must leave the sample alone, or an ensemble predicts the mean n times."""
    model, optimizer = attached(steps=2)
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
    model, optimizer = attached()
    twin = copy.deepcopy(model)
    twin(X)
    assert holds_mean(optimizer, model)
    model(X)
    twin.eval()(X)
    assert not holds_mean(optimizer, model)
