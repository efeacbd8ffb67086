"""Loops that end under Adam as the plain loop does: here, too, bit for bit."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ivon_lora.optim import sampling
from ivon_lora.optim.tied import exchange_memory
from tests import loop_problem
from tests.loop_problem import STEPS, Loop, X, Y, finish, fixed, loss_of, net, plain, train, undisturbed, vadam, weights


def evaluation(model: Any, optimizer: Any) -> None:
    model.eval()
    with torch.inference_mode():
        model(X)
    model.train()


def detached(model: Any, optimizer: Any) -> None:
    optimizer.attach(model).remove()
    ema_swap(model, optimizer)


def moved(model: Any, optimizer: Any) -> None:
    model.eval()
    for p in model.parameters():
        p.data = p.data.clone()
    model.train()


@contextlib.contextmanager
def zeroed(tensors: list[Tensor]) -> Iterator[None]:
    """As averages are exchanged with weights for a while."""
    stored = [x.clone() for x in tensors]
    for x in tensors:
        x.zero_()
    yield
    for x, value in zip(tensors, stored, strict=True):
        x.copy_(value)


def ema_swap(model: Any, optimizer: Any) -> None:
    model.eval()
    with zeroed([p.data for p in model.parameters()]), torch.no_grad():
        assert not model(X).any()
    model.train()


def ema_swaps_in_place(model: Any, optimizer: Any) -> None:
    """Over the sample and over the mean, without a word (warnings are errors here)."""
    tensors = [p.detach() for p in model.parameters()]
    loss_of(model).backward()
    with zeroed(tensors):
        pass
    finish(optimizer)
    with zeroed(tensors):
        pass


def in_a_backward_hook(read: Loop) -> Loop:
    """Before the last layer's backward, which needs its weights."""

    def step(model: Any, optimizer: Any) -> None:
        handle = model[2].register_full_backward_pre_hook(lambda *_: read(model, optimizer))
        loss_of(model).backward()
        handle.remove()
        finish(optimizer)

    return step


def state_dict_is_the_mean(model: Any, optimizer: Any) -> None:
    saved = model.state_dict()
    assert all(torch.equal(saved[name], optimizer.posterior(p).mean) for name, p in model.named_parameters())


def zero_grad_after_forward(model: Any, optimizer: Any) -> None:
    loss = loss_of(model)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def retain_graph_twice(model: Any, optimizer: Any) -> None:
    loss = loss_of(model) * 0.5
    loss.backward(retain_graph=True)
    evaluation(model, optimizer)
    loss.backward()
    finish(optimizer)


def out_of_memory(model: Any, optimizer: Any) -> None:
    """Once in the forward, once in the backward; then the batch is tried again."""

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    for register in (model[2].register_forward_pre_hook, model[1].register_full_backward_hook):
        handle = register(fail)
        try:
            loss_of(model).backward()
        except torch.OutOfMemoryError:
            optimizer.zero_grad()
        handle.remove()
    plain(model, optimizer)


def checkpointed(reentrant: bool) -> Loop:
    def step(model: Any, optimizer: Any) -> None:
        x = X.clone().requires_grad_()
        F.cross_entropy(checkpoint(model, x, use_reentrant=reentrant), Y).backward()
        finish(optimizer)

    return step


def another_default_dtype(model: Any, optimizer: Any) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        plain(model, optimizer)
    finally:
        torch.set_default_dtype(torch.float32)


def another_default_device(model: Any, optimizer: Any) -> None:
    with torch.device("meta"):
        plain(model, optimizer)


def through_functional_call(model: Any, optimizer: Any) -> None:
    F.cross_entropy(functional_call(model, dict(model.named_parameters()), (X,)), Y).backward()
    finish(optimizer)


def attack(training: bool) -> Loop:
    """Adversarial examples: gradients for the inputs only."""

    def step(model: Any, optimizer: Any) -> None:
        model.train(training)
        x = X.clone().requires_grad_()
        torch.autograd.grad(F.cross_entropy(model(x), Y), x)
        model.train()
        plain(model, optimizer)

    return step


#: besides those of `test_loops_fuzz`, which happen anywhere
DISTURBANCES: dict[str, Loop] = {
    "prediction": loop_problem.prediction,
    "attached twice, detached once": detached,
    "moved in eval mode": moved,
    "swapped with an average": ema_swap,
}
LOOPS: dict[str, Loop] = {
    "state_dict in a backward hook": in_a_backward_hook(state_dict_is_the_mean),
    "evaluation in a backward hook": in_a_backward_hook(evaluation),
    "zero_grad between forward and backward": zero_grad_after_forward,
    "one graph, two backwards": retain_graph_twice,
    "out of memory": out_of_memory,
    "step skipped by the scaler": loop_problem.skipped_by_the_scaler,
    "reentrant checkpoint": checkpointed(True),
    "checkpoint": checkpointed(False),
    "another default dtype": another_default_dtype,
    "another default device": another_default_device,
    "swapped with an average and back": ema_swaps_in_place,
    "functional_call": through_functional_call,
    "adversarial examples": attack(training=True),
    "adversarial examples in eval mode": attack(training=False),
}


@pytest.mark.parametrize("moment", ["before backward", "before step"])
@pytest.mark.parametrize("disturb", DISTURBANCES.values(), ids=list(DISTURBANCES))
def test_between_two_calls_of_the_plain_loop(disturb: Loop, moment: str) -> None:
    def step(model: Any, optimizer: Any) -> None:
        loss = loss_of(model)
        if moment == "before backward":
            disturb(model, optimizer)
        loss.backward()
        if moment == "before step":
            disturb(model, optimizer)
        finish(optimizer)

    assert torch.equal(train(step), undisturbed())


@pytest.mark.parametrize("loop", LOOPS.values(), ids=list(LOOPS))
def test_what_changes_nothing_under_adam_changes_nothing(loop: Loop) -> None:
    assert torch.equal(train(loop), undisturbed())


class Deep(nn.Sequential):
    def forward(self, x: Tensor) -> Any:
        return {"outputs": [{"heads": [{"logits": (super().forward(x),)}]}]}


class Output:
    __slots__ = ("logits",)
    logits: Tensor


class Slotted(nn.Sequential):
    def forward(self, x: Tensor) -> Output:
        output = Output()
        output.logits = super().forward(x)
        return output


class Silent(nn.Sequential):
    """Keeps its output, as adversarial networks do."""

    def forward(self, x: Tensor) -> None:
        self.output = super().forward(x)


class Weight(nn.Parameter):
    """As libraries have of their own."""


class OwnWeights(nn.Sequential):
    def __init__(self, *layers: Any) -> None:
        super().__init__(*layers)
        for layer in layers[::2]:
            layer.weight = Weight(layer.weight.detach())


@pytest.mark.parametrize(
    ("kind", "logits_in"),
    [
        (Deep, lambda output, model: output["outputs"][0]["heads"][0]["logits"][0]),
        (Slotted, lambda output, model: output.logits),
        (Silent, lambda output, model: model.output),
        (OwnWeights, lambda output, model: output),
    ],
)
def test_an_evaluation_before_the_backward_of_other_models(kind: Any, logits_in: Callable[[Any, Any], Tensor]) -> None:
    model = kind(*net())
    optimizer = vadam(model)
    for _ in range(STEPS):
        logits = logits_in(model(X), model)
        evaluation(model, optimizer)
        F.cross_entropy(logits, Y).backward()
        finish(optimizer)
    assert torch.equal(weights(model), undisturbed())


def test_autocast_keeps_no_sample_for_the_mean() -> None:
    """In one region it casts a weight once."""
    model, other = net(), net()
    optimizer = fixed(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model)
        with torch.no_grad():
            assert torch.equal(model.eval()(X), other(X))
        assert not torch.equal(model.train()(X), other(X))
        loss.backward()
    assert optimizer.is_sampled


@pytest.mark.parametrize("call", range(8))
def test_interrupted_between_sample_and_mean(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four parameters are exchanged for the evaluation, and four back for the backward."""
    calls = itertools.count()

    def exchange(*args: Any) -> None:
        if next(calls) == call:
            raise KeyboardInterrupt
        exchange_memory(*args)

    model = net()
    optimizer, before = fixed(model), weights(model)
    loss = loss_of(model)
    with monkeypatch.context() as patch:
        patch.setattr(sampling, "exchange_memory", exchange)
        try:
            evaluation(model, optimizer)
            loss.backward()
        except KeyboardInterrupt:
            pass
    assert next(calls) > call
    model.eval()
    assert torch.equal(weights(model), before)
    plain(model.train(), optimizer)
    assert torch.equal(weights(model), before)


def test_a_skipped_micro_batch_is_as_if_it_had_not_been() -> None:
    def step(micro_batches: list[int]) -> Loop:
        def run(model: Any, optimizer: Any) -> None:
            for n in micro_batches:
                loss = loss_of(model, slice(8 * (n % 2), 8 * (n % 2) + 8)) * (0.5 if n < 2 else float("nan"))
                if loss.isfinite():
                    loss.backward()
            finish(optimizer)

        return run

    assert torch.equal(train(step([0, 2, 1, 3])), train(step([0, 1])))


def test_a_forward_in_eval_mode_after_the_training_forward_belongs_to_its_loss() -> None:
    """Consistency losses: both see the sample, and the gradient is that of both at the sample."""
    model, other = net(), net()
    fixed(model)
    (loss := loss_of(model)).item()
    other.load_state_dict({name: p.detach().clone() for name, p in model.named_parameters()})
    model.eval()
    (loss + loss_of(model)).backward()
    (loss_of(other) + loss_of(other)).backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_a_forward_in_eval_mode_before_the_training_forward_is_named() -> None:
    model = net()
    optimizer = fixed(model)
    loss = loss_of(model.eval())
    loss = loss + loss_of(model.train())
    assert optimizer.is_sampled
    with pytest.warns(UserWarning, match="saw the posterior mean"), pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_eval_inside_a_backward_is_refused() -> None:
    model = net()
    optimizer = fixed(model)
    model[2].register_full_backward_pre_hook(lambda *_: optimizer.eval())
    with pytest.raises(RuntimeError, match="while a backward is running"):
        loss_of(model).backward()
