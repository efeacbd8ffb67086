"""`step(closure)`: samples around the closure, averages over K of them, and survives what happens inside."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ivon_lora import IVON
from tests.optimizer_problem import HYPER, Oracle, differing, gradient, make_params, new, photo, quadratic


def closure_of(optimizer: IVON, params: list[nn.Parameter], batch: int, clear: bool = True) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        if clear:
            optimizer.zero_grad()
        loss = quadratic(params, batch)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("hess_approx", ["price", "gradsq"])
@pytest.mark.parametrize(("mc_samples", "clear"), [(1, True), (2, True), (5, True), (3, False)])
def test_mc_samples_are_evaluations_averaged(mc_samples: int, clear: bool, hess_approx: str) -> None:
    hyper: dict[str, Any] = {**HYPER, "hess_approx": hess_approx}
    params = make_params()
    optimizer = IVON(params, **hyper, mc_samples=mc_samples)
    oracle = Oracle(params, hyper)
    for batch in range(4):
        optimizer.zero_grad()
        seen: list[float] = []
        inner = closure_of(optimizer, params, batch, clear)

        def closure(inner: Callable[[], Tensor] = inner, seen: list[float] = seen) -> Tensor:
            loss = inner()
            seen.append(loss.item())
            return loss

        loss = optimizer.step(closure)
        assert len(set(seen)) == len(seen) == mc_samples, "every evaluation has a sample of its own"
        assert loss.item() == pytest.approx(np.mean(seen), rel=1e-6)
        oracle.step([[gradient(oracle.theta(i, s), i, batch) for i in range(len(params))] for s in range(mc_samples)])
        oracle.check(optimizer, params)


@pytest.mark.parametrize("contexts", [1, 2, 3])
@pytest.mark.parametrize("mc_samples", [1, 2])
def test_closure_that_opens_contexts_itself(contexts: int, mc_samples: int) -> None:
    """The spelling of ivon-opt: one context per evaluation, or all of them inside one."""
    params = make_params()
    optimizer, oracle = new(params, mc_samples=mc_samples), Oracle(params, HYPER)
    evaluations = 0

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        losses = []
        for _ in range(contexts):
            with optimizer.sampled_params(train=True):
                losses.append(quadratic(params))
                losses[-1].backward()
        return torch.stack(losses).mean()

    optimizer.step(closure)
    if contexts == 1:
        assert evaluations == mc_samples
    n_samples = contexts * evaluations
    assert n_samples >= mc_samples
    oracle.step([[gradient(oracle.theta(i, s), i) for i in range(len(params))] for s in range(n_samples)])
    oracle.check(optimizer, params)


@pytest.mark.parametrize("loss", [None, 1.5])
def test_closure_may_return_none_or_a_float(loss: float | None) -> None:
    params = make_params()
    optimizer = new(params, mc_samples=2)

    def closure() -> float | None:
        closure_of(optimizer, params, 0)()
        return loss

    assert optimizer.step(closure) == loss


def test_closure_runs_with_gradients_enabled_and_step_may_be_called_without() -> None:
    params, others = make_params(), make_params()
    optimizer, plain = new(params), new(others)
    with torch.no_grad():
        optimizer.step(closure_of(optimizer, params, 0))
    plain.step(closure_of(plain, others, 0))
    assert differing(photo(optimizer), photo(plain)) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(("mc_samples", "evaluation"), [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("moment", ["start", "end"])
def test_an_error_in_the_closure_changes_nothing_and_the_step_can_be_repeated(
    error: type[BaseException], mc_samples: int, evaluation: int, moment: str
) -> None:
    params, others = make_params(), make_params()
    optimizer, undisturbed = new(params, mc_samples=mc_samples), new(others, mc_samples=mc_samples)
    for o, ps in ((optimizer, params), (undisturbed, others)):
        o.step(closure_of(o, ps, 0))
    before, calls = photo(optimizer), 0

    def failing() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == evaluation and moment == "start":
            raise error
        loss = closure_of(optimizer, params, 5)()
        if calls == evaluation:
            raise error
        return loss

    with pytest.raises(error):
        optimizer.step(failing)
    assert differing(photo(optimizer), before) == []
    for o, ps in ((optimizer, params), (undisturbed, others)):
        for batch in (1, 2):
            o.step(closure_of(o, ps, batch))
    assert differing(photo(optimizer), photo(undisturbed)) == []
