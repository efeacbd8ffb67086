"""Who may write the weights: one optimizer, or another, or the user; and what readers see meanwhile."""

import copy
import gc
import io
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ivon_lora import IVON, VAdam
from tests import loop_problem
from tests.loop_problem import STEPS, X, Y, finish, fixed, loss_of, net, plain, prediction, train, vadam, weights


def test_a_cell_run_twice_and_a_model_tried_before() -> None:
    model, kept = net(), []

    def cell() -> Tensor:
        model.load_state_dict(net().state_dict())
        optimizer = vadam(model)
        kept.append(optimizer)
        for _ in range(STEPS):
            plain(model, optimizer)
        mean = weights(model)
        loss_of(model)  # interrupted
        return mean

    assert torch.equal(cell(), cell())
    assert not torch.equal(weights(model), cell())
    model.eval()
    assert kept[0].completed_steps == STEPS
    before = weights(model)
    loss_of(model.train()).backward()
    with pytest.warns(UserWarning, match="another optimizer was made for the parameters of this one"):
        kept[0].step()
    model.eval()
    assert torch.equal(weights(model), before)
    loss = loss_of(model.train())
    vadam(model)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward()


def test_an_optimizer_that_is_gone_leaves_the_mean() -> None:
    model, before = net(), weights(net())

    def interrupted() -> None:
        optimizer = fixed(model)
        loss_of(model)
        assert optimizer.is_sampled
        assert not torch.equal(weights(model), before)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    gc.collect()
    assert torch.equal(weights(model), before)
    assert not model._forward_hooks
    assert "train" not in vars(model)


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_stage_of_sgd_on_the_same_parameters(order: str) -> None:
    model, other = net(), net()
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    if order == "after":
        plain(model, sgd)
        other.load_state_dict(model.state_dict())
    optimizer = fixed(model)
    plain(model, optimizer)
    loss_of(model).backward()
    gradients = [p.grad for p in model.parameters()]
    assert not torch.equal(weights(model), weights(other))
    finish(sgd)
    reference = torch.optim.SGD(other.parameters(), 0.1)
    for p, g in zip(other.parameters(), gradients, strict=True):
        p.grad = g
    finish(reference)
    for _ in range(3):
        plain(model, sgd)
        plain(other, reference)
    assert torch.equal(weights(model), weights(other))


class Every(torch.optim.Optimizer):
    """Steps an optimizer that it holds, with groups of its own, as ZeroRedundancyOptimizer does."""

    def __init__(self, params: Any, inner: torch.optim.Optimizer) -> None:
        super().__init__(params, {"lr": 1.0})
        self.optim = inner

    def step(self, closure: Any = None) -> Any:
        self.optim.step()


def test_an_optimizer_that_holds_ours_leaves_it_the_parameters() -> None:
    wrappers: dict[Any, Every] = {}

    def loop(model: Any, optimizer: Any) -> None:
        plain(model, wrappers.setdefault(optimizer, Every(model.parameters(), optimizer)))

    assert torch.equal(train(loop), loop_problem.undisturbed())


def test_optimizers_of_one_model_have_noise_of_their_own() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].load_state_dict(model[0].state_dict())
    for layer in model:
        IVON(layer.parameters(), lr=0.1, ess=100).attach(model)  # gone at once
    optimizers = [IVON(layer.parameters(), lr=0.1, ess=100) for layer in model]
    for optimizer in optimizers:
        optimizer.attach(model)
    model(torch.ones(1, 3))
    assert not torch.isclose(model[0].weight, model[1].weight).any()


def test_a_step_for_every_parameter_inside_the_backward() -> None:
    """As one optimizer for all: torch's recipe for less memory."""

    def make(model: nn.Module) -> list[VAdam]:
        optimizers = [VAdam([p], lr=1e-2, num_examples=64) for p in model.parameters()]
        for p, optimizer in zip(model.parameters(), optimizers, strict=True):
            optimizer.attach(model)
            p.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: finish(optimizer))
        return optimizers

    def backward(model: nn.Module, _: Any) -> None:
        loss_of(model).backward()

    assert torch.equal(train(backward, make=make), train(plain))


def test_two_players() -> None:
    """A GAN: each optimizer counts the examples of its own gradient."""
    real, loss = X, F.binary_cross_entropy_with_logits
    generator, critic = nn.Linear(2, 4), nn.Linear(4, 1)
    first, second = vadam(generator), vadam(critic)
    ones, zeros = torch.ones(16, 1), torch.zeros(16, 1)
    for _ in range(STEPS):
        first.zero_grad()
        second.zero_grad()
        fake = generator(torch.randn(16, 2)).detach()
        loss(critic(torch.cat([real, fake])), torch.cat([ones, zeros])).backward()
        assert second.counted_examples == 32
        second.step()
        first.zero_grad()
        second.zero_grad()
        loss(critic(generator(torch.randn(16, 2))), ones).backward()
        assert first.counted_examples == 16
        first.step()
    assert first.completed_steps == second.completed_steps == STEPS


def test_players_that_are_frozen_while_the_other_one_moves() -> None:
    """As of pix2pix, or Lightning's toggle_optimizer, with zero_grad after the forward: noise in every turn."""
    generator, critic = nn.Linear(2, 4), nn.Linear(4, 1)
    first, second = fixed(generator), fixed(critic)
    before = weights(critic)
    for _ in range(3):
        fake = generator(torch.randn(16, 2))
        critic.requires_grad_(True)
        loss = critic(torch.cat([X, fake.detach()])).square().mean()
        assert not torch.isclose(weights(critic), before).any()
        second.zero_grad()
        loss.backward()
        second.step()
        critic.requires_grad_(False)
        loss = critic(fake).mean()
        first.zero_grad()
        loss.backward()
        first.step()
        assert torch.equal(weights(critic), before)
        assert second.counted_examples is None


def test_forwards_in_several_threads_leave_the_mean() -> None:
    """Of actors, say, in training mode."""
    model = net()
    optimizer, before = fixed(model), weights(model)

    def act() -> None:
        with torch.no_grad():
            for _ in range(50):
                model(X)

    threads = [threading.Thread(target=act) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    model.eval()
    assert torch.equal(weights(model), before)
    assert not optimizer.is_sampled


def test_a_group_that_is_removed_gets_its_mean_back_and_the_others_their_update() -> None:
    model, other = net(), net()
    optimizer, reference = (
        IVON([{"params": m[0].parameters()}, {"params": m[2].parameters()}], lr=0.1, ess=100) for m in (model, other)
    )
    for o, m in ((optimizer, model), (reference, other)):
        o.attach(m)
        loss_of(m).backward()
    before = weights(net()[0])
    optimizer.param_groups.pop(0)
    finish(optimizer)
    finish(reference)
    assert torch.equal(weights(model[0]), before)
    assert not torch.equal(weights(model[2]), weights(net()[2]))


class WithLoss(nn.Sequential):
    def loss(self) -> Tensor:
        hidden = X
        for layer in self:
            hidden = layer(hidden)
        return F.cross_entropy(hidden, Y)


@pytest.mark.parametrize("how", ["no attach", "eval mode", "another method", "per-sample gradients"])
def test_where_no_sample_is_ever_drawn_it_trains_like_adam(how: str) -> None:
    model, other = (WithLoss(*net()).train(how != "eval mode") for _ in range(2))
    optimizer = VAdam(model.parameters(), lr=1e-2, num_examples=64, prior_std=1e3)
    adam = torch.optim.Adam(other.parameters(), lr=1e-2)
    if how != "no attach":
        optimizer.attach(model)

    def one(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, weights, (x[None],)), y[None])

    def step() -> None:
        plain(other, adam)
        if how == "per-sample gradients":
            detached = {name: p.detach() for name, p in model.named_parameters()}
            each = vmap(grad(one), (None, 0, 0))(detached, X, Y)
            for name, p in model.named_parameters():
                p.grad = each[name].mean(0)
        else:
            (model.loss() if how == "another method" else loss_of(model)).backward()
        finish(optimizer)

    with pytest.warns(UserWarning, match="without a posterior sample: the curvature is learned at the mean"):
        step()
    for _ in range(29):  # and says so once: warnings are errors here
        step()
    torch.testing.assert_close(weights(model), weights(other), rtol=0, atol=2e-3)


def test_an_embedding_that_bounds_its_norms_does_not_move_the_mean() -> None:
    ids = torch.arange(6)
    model: Any = nn.Sequential(nn.Embedding(6, 4, max_norm=1.0), nn.Linear(4, 3))
    model(ids)  # from here on the mean satisfies the bound
    optimizer, before = fixed(model), model[0].weight.detach().clone()
    for _ in range(50):
        F.cross_entropy(model(ids), ids % 3).backward()
        finish(optimizer)
    torch.testing.assert_close(model[0].weight.detach(), before)


@pytest.mark.parametrize(
    "how", ["skipped by the scaler", "skipped after a prediction", "unused forward", "interrupted", "model.zero_grad"]
)
def test_readers_see_the_mean(how: str) -> None:
    model = net()
    optimizer, before = fixed(model), weights(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for _ in range(3):
        if how == "skipped by the scaler":
            loop_problem.skipped_by_the_scaler(model, optimizer)
        elif how == "skipped after a prediction":
            loss_of(model).backward()
            prediction(model, optimizer)
            optimizer.zero_grad()
        elif how == "model.zero_grad":
            loss_of(model).backward()
            model.zero_grad()
        else:
            loss = loss_of(model)
            if how == "interrupted":
                loss.backward()
            model.eval()
        average.update_parameters(model)
        saved = io.BytesIO()
        torch.save(model, saved)
        saved.seek(0)
        for read in (average.module, copy.deepcopy(model), torch.load(saved, weights_only=False)):
            assert torch.equal(weights(read), before)
        model.train()
