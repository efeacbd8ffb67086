"""What users change between two calls is seen at the next one: replaced, moved, frozen, written, or mistaken."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ivon_lora.backends.eager import EagerBackend
from tests.compiler import BACKENDS
from tests.optimizer_problem import SHAPES, differing, equal, make_params, new, photo, target


class Twin:
    """Some parameters, an optimizer, and gradients that depend on the step only."""

    def __init__(self, backend: str, contiguous: bool = False) -> None:
        self.params = make_params([*SHAPES, (4, 1200)])
        if not contiguous:
            self.params[-1].data = self.params[-1].data.t().contiguous().t()
        self.optimizer = new(self.params, hess_init=0.5, backend=backend)
        self.steps = 0

    def step(self, between: Callable[[Twin], None] = lambda twin: None) -> None:
        self.optimizer.train()
        for i, p in enumerate(self.params):
            p.grad = target(i, p.shape, self.steps).to(p.dtype)
        between(self)
        self.optimizer.step()
        self.steps += 1

    def states(self) -> list[tuple[dict[str, Tensor], str]]:
        states = [self.optimizer.state[p] for p in self.params]
        return [(state, name) for state in states for name in ("hess", "momentum", "mean") if name in state]

    def means(self) -> list[Tensor]:
        return [self.optimizer.posterior(p).mean for p in self.params]


Change = Callable[[Twin], None]


def replaced(twin: Twin) -> None:
    for state, name in twin.states():
        state[name] = state[name] * 2


def relocated(twin: Twin) -> None:
    for p in twin.params:
        p.data = p.data.clone()


def moved(twin: Twin) -> None:
    for state, name in twin.states():
        state[name].data = state[name].data * 2


def written(twin: Twin) -> None:
    for state, name in twin.states():
        state[name].mul_(2)


def exchanged(twin: Twin) -> None:
    """Python's objects stay, and lead to other tensors."""
    for p in twin.params:
        other = nn.Parameter(p.detach().clone())
        other.grad = p.grad
        torch.utils.swap_tensors(p, other)


def spread(twin: Twin) -> None:
    """Gradients of any strides."""
    for p in twin.params:
        assert p.grad is not None
        p.grad = p.grad.reshape(-1)[:1].expand(p.numel()).reshape(p.shape)
        if p.dim() == 2:
            p.grad = p.grad.t().contiguous().t()


def spread_plainly(twin: Twin) -> None:
    spread(twin)
    for p in twin.params:
        assert p.grad is not None
        p.grad = p.grad.contiguous()


def of_16_bits(twin: Twin) -> None:
    for p in twin.params:
        assert p.grad is not None
        p.grad_dtype = None
        p.grad = p.grad.bfloat16()


def rounded(twin: Twin) -> None:
    for p in twin.params:
        assert p.grad is not None
        p.grad = p.grad.bfloat16().float()


def nothing(twin: Twin) -> None:
    """The other twin's parameters only change places."""


def frozen(twin: Twin) -> None:
    twin.params[1].requires_grad_(False)


def transposed(twin: Twin) -> None:
    """Another shape over the same memory."""
    twin.params[-1].data = twin.params[-1].data.view(1200, 4).t()


def cast(twin: Twin) -> None:
    for p in twin.params:
        p.data = p.data.bfloat16()


def regrouped(twin: Twin) -> None:
    group = twin.optimizer.param_groups[0]
    last = group["params"].pop()
    twin.optimizer.param_groups.append({**group, "params": [last], "ess": 7.0})


def counted(twin: Twin) -> None:
    twin.optimizer.state[twin.params[0]]["step"] = torch.tensor(9.0)


def forgotten(twin: Twin) -> None:
    twin.optimizer.state.clear()


def one_forgotten(twin: Twin) -> None:
    del twin.optimizer.state[twin.params[2]]


def loaded(twin: Twin) -> None:
    twin.optimizer.load_state_dict(copy.deepcopy(twin.optimizer.state_dict()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "change",
    [
        replaced, moved, written, relocated, exchanged, frozen, transposed, cast, regrouped, counted, forgotten,
        one_forgotten, loaded, nothing,
    ],
)  # fmt: skip
def test_the_next_draw_works_with_what_is_there(change: Change, backend: str) -> None:
    """As in a copy of the optimizer, which has seen nothing of what was there before."""
    twin = Twin(backend, contiguous=True)
    for _ in range(2):
        twin.step()
    twins = twin, copy.deepcopy(twin)
    for each in twins:
        change(each)
        each.optimizer.train()
    assert equal(twins[0].params, twins[1].params)
    for each in twins:
        for _ in range(2):
            each.step()
    assert differing(photo(twins[0].optimizer), photo(twins[1].optimizer)) == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(
    ("change", "same_as"),
    [
        (replaced, written),
        (moved, written),
        (relocated, nothing),
        (exchanged, nothing),
        (spread, spread_plainly),
        (of_16_bits, rounded),
    ],
)
def test_the_next_call_works_with_what_is_there(change: Change, same_as: Change, sampled: bool, backend: str) -> None:
    if change is of_16_bits and not hasattr(Tensor, "grad_dtype"):
        pytest.skip("gradients have the dtype of their parameters")
    twins = Twin(backend), Twin(backend)
    for twin, event in zip(twins, (change, same_as), strict=True):
        for _ in range(2):
            twin.step()

        def between(twin: Twin, event: Change = event) -> None:
            event(twin)
            if not sampled:
                twin.optimizer.eval()

        twin.step(between)
        for _ in range(2):
            twin.step()
    assert differing(photo(twins[0].optimizer), photo(twins[1].optimizer)) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_refused_draw_leaves_no_mean_behind(backend: str) -> None:
    """An old one in a state dict would come back as the weights."""
    refused, other = Twin(backend, contiguous=True), Twin(backend, contiguous=True)
    for twin in (refused, other):
        regrouped(twin)
        twin.step()
    last = refused.optimizer.param_groups[1]
    last["lr"], lr = -1.0, last["lr"]
    with pytest.raises(ValueError, match="lr must lie"):
        refused.optimizer.train()
    assert not any("mean" in state for state in refused.optimizer.state.values())
    last["lr"] = lr
    for twin in (refused, other):
        twin.step()
    assert differing(photo(refused.optimizer), photo(other.optimizer)) == []


def test_an_error_in_a_step_leaves_the_mean_to_come_back_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample stays, and with it the gradient: the step can be made again, with the same bits."""
    failing, other = Twin("eager"), Twin("eager")
    for twin in (failing, other):
        twin.step()
    means = failing.means()

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    def interrupted(twin: Twin) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(EagerBackend, "step", fail)
            with pytest.raises(KeyboardInterrupt):
                twin.optimizer.step()
        assert equal(twin.means(), means)

    failing.step(interrupted)
    other.step()
    assert differing(photo(failing.optimizer), photo(other.optimizer)) == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("rows", [2, 9])
def test_a_parameter_of_another_shape_is_refused_until_its_state_is_forgotten(
    rows: int, sampled: bool, backend: str
) -> None:
    p, q = make_params([(5, 3), (7,)])
    optimizer = new([p, q], hess_init=0.5, backend=backend)

    def step() -> None:
        optimizer.train()
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        optimizer.step()

    step()
    mean = q.detach().clone()
    if sampled:
        optimizer.train()
    p.data = torch.full((rows, 3), 3.0)
    p.grad = None
    with pytest.raises(ValueError, match=rf"shape \({rows}, 3\), and its state \(5, 3\)"):
        step()
    optimizer.eval()
    assert torch.equal(q, mean)
    assert torch.equal(p, torch.full((rows, 3), 3.0))
    del optimizer.state[p]
    step()
    assert optimizer.posterior(p).mean.shape == (rows, 3)
    assert bool((p < 3.0).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_of_another_size_is_refused_before_anything_changes(backend: str) -> None:
    (p,) = make_params([(5, 3)])
    optimizer = new([p], hess_init=0.5, backend=backend)
    optimizer.train()
    p.data = p.data[:2]  # the same memory, so that nobody sees it at once
    p.grad = torch.ones(2, 3)
    before = photo(optimizer)
    with pytest.raises(RuntimeError, match="another size than its parameter had"):
        optimizer.step()
    assert differing(photo(optimizer), before) == []


def test_gradients_can_be_freed_after_the_step() -> None:
    (p,) = make_params([(5, 3)])
    optimizer = new([p], hess_init=0.5)
    optimizer.train()
    p.grad = torch.ones_like(p)
    gradient = weakref.ref(p.grad)
    optimizer.step()
    optimizer.zero_grad()
    assert gradient() is None
