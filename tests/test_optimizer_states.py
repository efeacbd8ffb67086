"""The two states of the weights: transitions, contexts, predictions, and what the user writes meanwhile."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ivon_lora import IVON
from ivon_lora.backends.eager import EagerBackend
from tests.compiler import BACKENDS
from tests.optimizer_problem import HYPER, Oracle, equal, gradient, make_params, new, quadratic, run, train_step, values

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


# ---------------------------------------------------------------- the machine


@pytest.mark.parametrize("dtype", DTYPES)
def test_train_and_eval_are_idempotent_and_the_mean_returns_bit_for_bit(dtype: torch.dtype) -> None:
    params = make_params(dtype=dtype)
    optimizer = new(params)
    run(optimizer, params, range(3))
    mean, pointers, first = values(params), [p.data_ptr() for p in params], repr(optimizer)
    optimizer.eval()
    assert equal(params, mean)
    optimizer.train()
    sample = values(params)
    assert not any(torch.equal(a, b) for a, b in zip(sample, mean, strict=True))
    optimizer.train()
    assert equal(params, sample)
    assert repr(optimizer) == first
    for _ in range(2):
        optimizer.eval()
        assert equal(params, mean)
    optimizer.train()
    assert equal(params, sample), "the sample of a step is a function of its key"
    optimizer.load_state_dict(optimizer.state_dict())
    assert equal(params, mean)
    assert [p.data_ptr() for p in params] == pointers


@pytest.mark.parametrize("dtype", DTYPES)
def test_step_leaves_the_mean_and_only_the_promised_state(dtype: torch.dtype) -> None:
    params = make_params(dtype=dtype)
    optimizer = new(params)
    run(optimizer, params, range(2))
    expected = {"step", "momentum", "hess"} | ({"mean"} if dtype in (torch.bfloat16, torch.float16) else set())
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for p in params:
        state = optimizer.state[p]
        assert set(state) == expected
        assert all(state[k].dtype == wide and state[k].shape == p.shape for k in expected - {"step"})
        assert (state["step"].shape, state["step"].dtype, state["step"].item()) == ((), torch.float32, 2)
        assert torch.equal(p, optimizer.posterior(p).mean.to(dtype))
    means = [optimizer.posterior(p).mean for p in params]
    optimizer.train()
    assert all(set(optimizer.state[p]) == expected | {"mean"} for p in params)
    saved = optimizer.state_dict()["state"]
    assert equal([optimizer.state[p]["mean"] for p in params], means)
    assert equal([saved[i]["mean"] for i in range(len(params))], means)


def test_samples_leave_the_global_random_state_alone_and_follow_their_own_seed() -> None:
    def end(global_seed: int, seed: int) -> list[Tensor]:
        torch.manual_seed(global_seed)
        np.random.seed(global_seed)  # noqa: NPY002
        before = torch.get_rng_state(), pickle.dumps(np.random.get_state())  # noqa: NPY002
        params = make_params([(3, 5), (7,)])
        optimizer = new(params, seed=seed)
        run(optimizer, params, range(5))
        with optimizer.sampled_params():
            optimizer.metrics()
        assert torch.equal(torch.get_rng_state(), before[0])
        assert pickle.dumps(np.random.get_state()) == before[1]  # noqa: NPY002
        return values(params)

    assert equal(end(1, 7), end(2, 7))
    assert not equal(end(1, 7), end(1, 8))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.filterwarnings("ignore:no parameter of this optimizer has a gradient")
def test_without_gradients_nothing_changes_but_the_count(frozen: bool) -> None:
    params = make_params()
    for p in params:
        p.requires_grad_(not frozen)
    optimizer, before = new(params), values(params)
    assert optimizer.step() is None  # nothing to warn about
    optimizer.train()
    assert equal(params, before) == frozen
    optimizer.step()
    optimizer.eval()
    assert equal(params, before)
    assert optimizer.completed_steps == 2


# ---------------------------------------------------------------- contexts


@pytest.mark.parametrize("hess_approx", ["price", "gradsq"])
@pytest.mark.parametrize("zero", ["inside", "between", "never"])
def test_contexts_are_averaged_over_however_many_were_opened(hess_approx: str, zero: str) -> None:
    params = make_params()
    hyper: dict[str, Any] = {**HYPER, "hess_approx": hess_approx}
    optimizer, oracle = IVON(params, **hyper), Oracle(params, hyper)
    for batch, n_samples in enumerate((1, 3, 2, 1, 4)):
        grads = []
        optimizer.zero_grad()
        for sample in range(n_samples):
            if zero == "between":
                optimizer.zero_grad()
            with optimizer.sampled_params(train=True):
                if zero == "inside":
                    optimizer.zero_grad()
                quadratic(params, batch).backward()
            grads.append([gradient(oracle.theta(i, sample), i, batch) for i in range(len(params))])
        if zero == "between" and batch % 2:
            optimizer.zero_grad()  # ivon-opt has read the gradients when a context closes
        optimizer.step()
        oracle.step(grads)
        oracle.check(optimizer, params)


@pytest.mark.parametrize("without", [{0: {0}}, {0: {1}}, {0: {2}}, {1: {0}}, {1: {0, 1}}, {0: {1}, 1: {2}}])
def test_a_gradient_that_a_sample_does_not_give_is_zero(without: dict[int, set[int]]) -> None:
    """Of parameter i in the samples ``without[i]``, of three."""
    params = make_params([(4,), (4,)])
    optimizer, oracle = new(params), Oracle(params, HYPER)
    grads: list[list[np.ndarray | None]] = []
    for sample in range(3):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            wanted = [i for i in range(2) if sample not in without.get(i, ())]
            terms = [(1 + i) / 2 * (params[i] - params[i].detach() + 1).square().sum() for i in wanted]
            if terms:
                torch.stack(terms).sum().backward()
        grads.append([np.full(4, 1.0 + i) if i in wanted else None for i in range(2)])
    optimizer.step()
    oracle.step(grads)
    oracle.check(optimizer, params)


@pytest.mark.parametrize("train", [True, False])
def test_nested_contexts_pass_through(train: bool) -> None:
    params, others = make_params(), make_params()
    optimizer, plain = new(params), new(others)
    mean = values(params)
    with optimizer.sampled_params(train=train):
        sample = values(params)
        for inner in (True, False):
            with optimizer.sampled_params(train=inner):
                assert equal(params, sample)
            assert equal(params, sample)
        if train:
            quadratic(params).backward()
    assert equal(params, mean)
    if train:
        optimizer.step()
        train_step(plain, others, 0)
        assert equal(params, others)


def test_contexts_and_a_sample_that_is_there_already() -> None:
    params = make_params()
    optimizer = new(params)
    optimizer.train()
    sample = values(params)
    with optimizer.sampled_params():
        assert not equal(params, sample)
    assert equal(params, sample)
    with optimizer.sampled_params(train=True):
        assert equal(params, sample)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("moment", ["before zero_grad", "after backward", "in a prediction"])
def test_context_left_by_an_error_restores_the_mean_and_does_not_count(moment: str, error: type[BaseException]) -> None:
    """The loop catches the error and repeats the step: the same as if nothing had happened."""

    def interrupted(optimizer: IVON, params: list[nn.Parameter]) -> None:
        with optimizer.sampled_params(train=moment != "in a prediction"):
            if moment == "after backward":
                optimizer.zero_grad()
                quadratic(params, 77).backward()
            raise error

    params, others = make_params(), make_params()
    optimizer, undisturbed = new(params), new(others)
    for batch in range(3):
        if batch == 1:
            mean = values(params)
            with pytest.raises(error):
                interrupted(optimizer, params)
            assert equal(params, mean)
        for o, ps in ((optimizer, params), (undisturbed, others)):
            with o.sampled_params(train=True):
                o.zero_grad()
                quadratic(ps, batch).backward()
            o.step()
    assert equal(params, others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interrupt_while_the_sample_is_written(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    params, others = make_params(dtype=dtype), make_params(dtype=dtype)
    optimizer = new(params, backend="eager")
    run(optimizer, params, range(2))
    mean = values(params)

    def interrupted(backend: EagerBackend, batches: Any, key: Any) -> None:
        """When two of the four are written."""
        monkeypatch.undo()
        [batch] = batches
        middle = {role: value[1:3] for role, value in vars(batch).items() if isinstance(value, list)}
        backend.sample([replace(batch, **middle)], key)
        assert not equal(params[1:3], mean[1:3])
        raise KeyboardInterrupt

    monkeypatch.setattr(EagerBackend, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.train()
    assert equal(params, mean)
    train_step(optimizer, params, 2)
    run(new(others), others, range(3))
    assert equal(params, others)


# ---------------------------------------------------------------- what the user writes


Writer = Callable[[Tensor, Tensor], object]
WRITERS: dict[str, Writer] = {
    "in place": lambda p, value: p.detach().copy_(value),
    "new memory": lambda p, value: setattr(p, "data", value.clone()),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("writer", WRITERS.values(), ids=list(WRITERS))
@pytest.mark.parametrize("end", ["eval", "train", "step", "state_dict", "posterior", "prediction"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_written_over_a_sample_changes_the_mean(
    writer: Writer, end: str, dtype: torch.dtype, backend: str
) -> None:
    params = make_params([(4, 3), (5,)], dtype=dtype)
    params[0].data = params[0].data.t().contiguous().t()
    optimizer = new(params, lr=0.0, backend=backend)
    run(optimizer, params, range(2))
    expected, neighbour = (optimizer.posterior(p).mean for p in params)
    value = torch.arange(12.0).reshape(4, 3).to(dtype)
    optimizer.train()
    quadratic(params).backward()
    value[0] = params[0].detach()[0]  # these elements are not written
    expected = expected + (value.float() - params[0].detach().float())
    writer(params[0], value)

    def predict() -> None:
        with optimizer.sampled_params():
            pass

    endings: dict[str, Callable[[], Any]] = {
        "eval": optimizer.eval,
        "train": optimizer.train,  # as a second training forward of an attached model
        "step": optimizer.step,
        "state_dict": lambda: optimizer.state_dict()["state"][0]["mean"],
        "posterior": lambda: optimizer.posterior(params[0]).mean,
        "prediction": predict,
    }
    with pytest.warns(UserWarning, match="posterior sample; the change was made to the mean"):
        noticed = endings[end]()
    assert noticed is None or torch.equal(noticed, expected)
    optimizer.eval()
    assert torch.equal(optimizer.posterior(params[0]).mean, expected)
    assert torch.equal(optimizer.posterior(params[1]).mean, neighbour), "a neighbour keeps its mean, fp32 bits included"
    assert torch.equal(params[0], expected.to(dtype))
    optimizer.train()
    writer(params[0], value + 1)  # the second time without a warning (warnings are errors here)
    optimizer.eval()
    assert not torch.equal(params[0], expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "writer", [*WRITERS.values(), lambda p, value: p.data.copy_(value)], ids=[*WRITERS, "through data"]
)
def test_what_is_written_over_the_mean_is_what_trains(writer: Writer, dtype: torch.dtype) -> None:
    params = make_params([(4, 3), (5,)], dtype=dtype)
    optimizer = new(params)
    run(optimizer, params, range(3))
    value = torch.arange(12.0).reshape(4, 3).to(dtype) / 8
    kept = optimizer.posterior(params[1]).mean.clone()
    writer(params[0], value)
    assert torch.equal(optimizer.posterior(params[0]).mean, value.to(kept.dtype))
    assert torch.equal(optimizer.posterior(params[1]).mean, kept)
    optimizer.train()
    optimizer.eval()
    assert torch.equal(params[0], value)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    for p in params:
        p.grad = torch.zeros_like(p)
        optimizer.state[p]["momentum"].zero_()
    optimizer.train()
    optimizer.step()  # zero momentum, gradient and weight decay: nothing moves
    assert torch.equal(params[0], value)
    assert torch.equal(optimizer.posterior(params[1]).mean, kept)


# ---------------------------------------------------------------- readings and notices


@pytest.mark.parametrize("dtype", DTYPES)
def test_readings_are_the_same_in_both_states(dtype: torch.dtype) -> None:
    params = make_params([(3, 5), (7,)], dtype)
    optimizer = new(params)
    run(optimizer, params, range(3))

    def read() -> list[Tensor]:
        out = []
        for p in params:
            posterior = optimizer.posterior(p)
            out += [posterior.mean, posterior.stddev, posterior.variance]
            out += [optimizer.snr(p, c) for c in ("snr", "snr_abs", "magnitude", "inverse_std")]
        metrics = optimizer.metrics()
        assert all(isinstance(v, float) for v in metrics.values())
        return [*out, torch.tensor(list(metrics.values()))]

    in_mean = read()
    optimizer.train()
    sample = values(params)
    assert equal(read(), in_mean)
    assert equal(params, sample), "reading changes nothing"
    optimizer.eval()
    with optimizer.sampled_params():
        assert equal(read(), in_mean)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(x.dtype == wide for x in in_mean[:-1])


def test_a_posterior_is_a_snapshot() -> None:
    params = make_params()
    optimizer = new(params)
    assert optimizer.metrics()["step"] == 0.0
    posterior = optimizer.posterior(params[0])
    assert posterior.sample().shape == params[0].shape
    kept = posterior.mean.clone(), posterior.stddev.clone()
    train_step(optimizer, params, 0)
    assert equal([posterior.mean, posterior.stddev], kept)
    posterior.mean.fill_(9.0)
    assert not (params[0] == 9.0).any()
    with pytest.raises(ValueError, match="not a parameter"):
        optimizer.posterior(torch.zeros(3))


def test_step_without_a_sample_warns_once_and_keeps_the_hessian() -> None:
    params = make_params()
    optimizer, oracle = new(params), Oracle(params, HYPER)
    for batch in range(3):
        optimizer.zero_grad()
        grads = [gradient(m, i, batch) for i, m in enumerate(o.mean for o in oracle.each)]
        quadratic(params, batch).backward()
        if batch == 0:
            with pytest.warns(UserWarning, match=r"train\(\)"):
                optimizer.step()
        else:
            optimizer.step()
        oracle.step([grads], sampled=False)
        oracle.check(optimizer, params)
        assert all((optimizer.state[p]["hess"] == 1.0).all() for p in params)
    train_step(optimizer, params, 3)  # sampling later works, and needs no further warning
    oracle.train_step(3)
    oracle.check(optimizer, params)
