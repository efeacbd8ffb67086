"""The two states of the weights: transitions, contexts, predictions, and what the user writes meanwhile."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ivon_lora import IVON
from ivon_lora.backends import Work
from ivon_lora.functional.ivon import Hyper
from ivon_lora.functional.noise import NoiseKey, normal
from tests.optimizer_problem import (
    Oracle,
    equal,
    gradient,
    make_params,
    photo,
    quadratic,
    run,
    same_photo,
    train_step,
    values,
)

HYPER: dict[str, Any] = {"lr": 0.1, "ess": 50.0, "beta2": 0.99, "weight_decay": 0.01}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def new(params: list[nn.Parameter], **more: object) -> IVON:
    return IVON(params, **{**HYPER, **more})


# ---------------------------------------------------------------- the machine


def test_loop_follows_the_oracle() -> None:
    params = make_params()
    optimizer, oracle = new(params, seed=3), Oracle.of(params, HYPER, seed=3)
    for batch in range(30):
        train_step(optimizer, params, batch)
        oracle.train_step(batch)
        oracle.check(optimizer, params)


def test_train_writes_the_sample_of_the_key() -> None:
    params = make_params()
    optimizer, oracle = new(params, seed=11), Oracle.of(params, HYPER, seed=11)
    for batch in range(3):
        optimizer.train()
        for i, p in enumerate(params):
            np.testing.assert_allclose(p.detach().numpy(), oracle.theta(i), rtol=1e-5, atol=1e-6)
        train_step(optimizer, params, batch)
        oracle.train_step(batch)


@pytest.mark.parametrize("dtype", DTYPES)
def test_train_and_eval_are_idempotent_and_the_mean_returns_bit_for_bit(dtype: torch.dtype) -> None:
    params = make_params(dtype=dtype)
    optimizer = new(params)
    run(optimizer, params, range(3))
    mean = values(params)
    optimizer.eval()
    assert equal(params, mean)
    optimizer.train()
    sample = values(params)
    assert not any(torch.equal(a, b) for a, b in zip(sample, mean, strict=True))
    optimizer.train()
    assert equal(params, sample)
    optimizer.eval()
    optimizer.eval()
    assert equal(params, mean)
    optimizer.train()
    assert equal(params, sample), "the sample of a step is a function of its key"
    optimizer.eval()


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
        assert state["step"].shape == ()
        assert state["step"].dtype == torch.float32
        assert state["step"].item() == 2
        assert torch.equal(p, optimizer.posterior(p).mean.to(dtype))
    optimizer.train()
    assert all(set(optimizer.state[p]) == expected | {"mean"} for p in params)


def test_pointers_never_change() -> None:
    params = make_params()
    optimizer = new(params)
    pointers = [p.data_ptr() for p in params]
    for batch in range(3):
        optimizer.train()
        assert [p.data_ptr() for p in params] == pointers
        train_step(optimizer, params, batch)
        with optimizer.sampled_params():
            assert [p.data_ptr() for p in params] == pointers
        optimizer.load_state_dict(optimizer.state_dict())
        assert [p.data_ptr() for p in params] == pointers
    import ivon  # the peer gives every sample new memory

    peer_params = make_params(shapes=[(64,)])
    peer = ivon.IVON(peer_params, lr=0.1, ess=50.0)
    before = peer_params[0].data_ptr()
    with peer.sampled_params():
        assert peer_params[0].data_ptr() != before


def test_global_random_state_is_untouched() -> None:
    params = make_params([(3, 5), (7,)])
    torch_state, numpy_state = torch.get_rng_state(), pickle.dumps(np.random.get_state())  # noqa: NPY002
    optimizer = new(params)
    run(optimizer, params, range(3))
    with optimizer.sampled_params():
        optimizer.metrics()
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert pickle.dumps(np.random.get_state()) == numpy_state  # noqa: NPY002


def test_samples_ignore_the_global_seed_and_follow_their_own() -> None:
    def end(global_seed: int, seed: int) -> list[Tensor]:
        torch.manual_seed(global_seed)
        params = make_params()
        run(new(params, seed=seed), params, range(5))
        return values(params)

    assert equal(end(1, 7), end(2, 7))
    assert not equal(end(1, 7), end(1, 8))


def test_in_place_change_between_forward_and_backward_is_noticed_by_autograd() -> None:
    params = make_params([(4, 4)])
    optimizer = new(params)
    optimizer.train()
    loss = (params[0] @ params[0]).sum()
    optimizer.eval()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_repr_works_in_both_states() -> None:
    params = make_params()
    optimizer = new(params)
    first = repr(optimizer)
    optimizer.train()
    assert repr(optimizer) == first
    assert "IVON" in first


def test_zero_grad_anywhere_keeps_the_sample() -> None:
    ends = []
    for place in ("before", "after", "twice"):
        params = make_params()
        optimizer = new(params)
        for batch in range(4):
            if place != "after":
                optimizer.zero_grad()
            optimizer.train()
            if place != "before":
                optimizer.zero_grad(set_to_none=False)
            quadratic(params, batch).backward()
            optimizer.step()
        ends.append(values(params))
    assert equal(ends[0], ends[1])
    assert equal(ends[0], ends[2])


def test_all_parameters_frozen_is_no_error() -> None:
    params = make_params()
    for p in params:
        p.requires_grad_(False)
    optimizer = new(params)
    before = values(params)
    optimizer.train()
    assert equal(params, before)
    optimizer.step()
    optimizer.eval()
    assert equal(params, before)


# ---------------------------------------------------------------- contexts


def test_one_context_equals_train() -> None:
    ends = []
    for context in (False, True):
        params = make_params()
        optimizer = new(params)
        for batch in range(4):
            if context:
                with optimizer.sampled_params(train=True):
                    optimizer.zero_grad()
                    quadratic(params, batch).backward()
                optimizer.step()
            else:
                train_step(optimizer, params, batch)
        ends.append(values(params))
    assert equal(*ends)


@pytest.mark.parametrize("hess_approx", ["price", "gradsq"])
@pytest.mark.parametrize("zero_inside", [True, False])
def test_contexts_are_averaged_over_however_many_were_opened(hess_approx: str, zero_inside: bool) -> None:
    params = make_params()
    hyper: dict[str, Any] = {**HYPER, "hess_approx": hess_approx}
    optimizer, oracle = IVON(params, **hyper), Oracle.of(params, hyper)
    for batch, n_samples in enumerate((1, 3, 2, 1, 4)):
        grads = []
        optimizer.zero_grad()
        for sample in range(n_samples):
            with optimizer.sampled_params(train=True):
                if zero_inside:
                    optimizer.zero_grad()
                quadratic(params, batch).backward()
            grads.append([gradient(oracle.theta(i, sample), i, batch) for i in range(len(params))])
        optimizer.step()
        oracle.step(grads)
        oracle.check(optimizer, params)


def test_zero_grad_between_contexts_loses_no_sample() -> None:
    params = make_params()
    optimizer, oracle = new(params), Oracle.of(params, HYPER)
    grads = []
    for sample in range(2):
        optimizer.zero_grad()
        with optimizer.sampled_params(train=True):
            quadratic(params).backward()
        grads.append([gradient(oracle.theta(i, sample), i) for i in range(len(params))])
    optimizer.step()
    oracle.step(grads)
    oracle.check(optimizer, params)


@pytest.mark.parametrize(
    "with_gradient",
    [
        1,
        0,
    ],
)
def test_parameter_with_a_gradient_in_one_of_two_samples_only(with_gradient: int) -> None:
    """A gradient that a sample does not give is zero: whichever of the samples it is."""
    params = make_params([(4,), (4,)])
    optimizer, oracle = new(params), Oracle.of(params, HYPER)
    grads: list[list[np.ndarray | None]] = []
    for sample in range(2):
        both = sample == with_gradient
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            quadratic(params if both else params[:1]).backward()
        grads.append([gradient(oracle.theta(0, sample), 0), gradient(oracle.theta(1, sample), 1) if both else None])
    optimizer.step()
    oracle.step(grads)
    oracle.check(optimizer, params)


def test_nested_contexts_pass_through() -> None:
    params = make_params()
    optimizer = new(params)
    mean = values(params)
    with optimizer.sampled_params(train=True):
        sample = values(params)
        with optimizer.sampled_params(train=True):
            assert equal(params, sample)
        assert equal(params, sample)
        with optimizer.sampled_params():
            assert equal(params, sample)
        assert equal(params, sample)
        quadratic(params).backward()
    assert equal(params, mean)
    with optimizer.sampled_params():
        sample = values(params)
        with optimizer.sampled_params(train=True):
            assert equal(params, sample)
        assert equal(params, sample)
    assert equal(params, mean)
    optimizer.step()
    other = make_params()
    plain = new(other)
    train_step(plain, other, 0)
    assert equal(params, other)


def test_context_takes_a_sample_that_is_live_already() -> None:
    params = make_params()
    optimizer = new(params)
    optimizer.train()
    sample = values(params)
    with optimizer.sampled_params(train=True):
        assert equal(params, sample)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("train", [True, False])
def test_error_inside_a_context_restores_the_mean(error: type[BaseException], train: bool) -> None:
    params = make_params()
    optimizer = new(params)
    run(optimizer, params, range(2))
    mean = values(params)
    with pytest.raises(error), optimizer.sampled_params(train=train):
        raise error
    assert equal(params, mean)
    optimizer.eval()
    assert equal(params, mean)
    if error is RuntimeError:
        import ivon  # the peer keeps the sample for ever

        peer_params = make_params()
        peer = ivon.IVON(peer_params, lr=0.1, ess=50.0)
        with pytest.raises(RuntimeError), peer.sampled_params(train=train):
            raise RuntimeError
        assert not equal(peer_params, make_params())


@pytest.mark.parametrize("moment", ["before zero_grad", "after backward"])
def test_context_left_by_an_error_does_not_count(moment: str) -> None:
    """The loop catches the error and repeats the step: the same as if nothing had happened."""

    def interrupted(optimizer: IVON, params: list[nn.Parameter]) -> None:
        with optimizer.sampled_params(train=True):
            if moment == "after backward":
                optimizer.zero_grad()
                quadratic(params, 77).backward()
            raise KeyboardInterrupt

    params, others = make_params(), make_params()
    optimizer, undisturbed = new(params), new(others)
    for batch in range(3):
        if batch == 1:
            with pytest.raises(KeyboardInterrupt):
                interrupted(optimizer, params)
        for o, ps in ((optimizer, params), (undisturbed, others)):
            with o.sampled_params(train=True):
                o.zero_grad()
                quadratic(ps, batch).backward()
            o.step()
    assert equal(params, others)


def test_error_between_train_and_step() -> None:
    params = make_params()
    optimizer = new(params)
    run(optimizer, params, range(2))
    mean = values(params)
    optimizer.train()
    saved = optimizer.state_dict()  # what a handler of Ctrl-C may save
    assert all(torch.equal(saved["state"][i]["mean"], m) for i, m in enumerate(mean))
    optimizer.eval()
    assert equal(params, mean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interrupt_while_the_sample_is_written(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    params = make_params(dtype=dtype)
    optimizer = new(params)
    run(optimizer, params, range(2))
    mean = values(params)
    backend = optimizer.backend_of(params[0].device)

    sample, calls = backend.sample, []

    def interrupted(works: Sequence[Work], hyper: Hyper, key: NoiseKey) -> None:
        calls.append(len(works))
        sample(works[1:3] if len(calls) == 1 else works, hyper, key)
        if len(calls) == 1:
            assert not equal(params[1:3], mean[1:3])
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(backend, "sample", interrupted)
        with pytest.raises(KeyboardInterrupt):
            optimizer.train()
    assert equal(params, mean)
    train_step(optimizer, params, 2)
    others = make_params(dtype=dtype)
    run(new(others), others, range(3))
    assert equal(params, others)


# ---------------------------------------------------------------- prediction


def test_prediction_noise_is_its_own() -> None:
    params = make_params()
    optimizer = new(params, seed=5)
    optimizer.train()
    training = values(params)
    optimizer.eval()
    draws = []
    for number in range(3):
        with optimizer.sampled_params():
            draws.append(values(params))
            expected = normal(NoiseKey(5, number, prediction=True), 0, params[0].shape, "cpu")
            sigma = optimizer.posterior(params[0]).stddev
            noise = (params[0].detach() - optimizer.posterior(params[0]).mean) / sigma
            torch.testing.assert_close(noise, expected, rtol=1e-4, atol=1e-4)
    assert not any(equal(draw, training) for draw in draws)
    assert not equal(draws[0], draws[1])
    assert not equal(draws[1], draws[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", ["before train", "after backward", "between micro-batches", "between contexts"])
def test_prediction_never_disturbs_training(place: str, dtype: torch.dtype) -> None:
    ends = []
    for predict in (False, True):
        params = make_params(dtype=dtype)
        optimizer = new(params)

        def prediction(here: str, optimizer: IVON = optimizer, predict: bool = predict) -> None:
            if predict and here == place:
                for _ in range(2):
                    with optimizer.sampled_params(), torch.no_grad():
                        quadratic(params)  # noqa: B023

        for batch in range(4):
            prediction("before train")
            optimizer.zero_grad()
            if place == "between contexts":
                for _ in range(2):
                    with optimizer.sampled_params(train=True):
                        quadratic(params, batch).backward()
                    prediction("between contexts")
            else:
                for micro in range(2):
                    optimizer.train()
                    quadratic(params, 10 * batch + micro).backward()
                    prediction("between micro-batches")
            prediction("after backward")
            optimizer.step()
        ends.append(photo(optimizer))
    assert same_photo(*ends)


def test_prediction_between_train_and_forward_gives_the_sample_back() -> None:
    params = make_params()
    optimizer = new(params)
    optimizer.train()
    sample = values(params)
    with optimizer.sampled_params():
        pass
    assert equal(params, sample)


def test_prediction_in_inference_mode_before_training() -> None:
    """What is created in inference mode must be fit for training afterwards."""
    params, others = make_params(), make_params()
    optimizer, undisturbed = new(params), new(others)
    with torch.inference_mode(), optimizer.sampled_params():
        quadratic(params)
    run(optimizer, params, range(2))
    run(undisturbed, others, range(2))
    assert equal(params, others)


def test_eval_in_inference_mode() -> None:
    params = make_params()
    optimizer = new(params)
    run(optimizer, params, range(1))
    mean = values(params)
    optimizer.train()
    with torch.inference_mode():
        optimizer.eval()
    assert equal(params, mean)
    run(optimizer, params, range(1, 3))
    others = make_params()
    run(new(others), others, range(3))
    assert equal(params, others)


# ---------------------------------------------------------------- what the user writes


def _in_place(p: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        p.copy_(value)


def _through_data(p: Tensor, value: Tensor) -> None:
    p.data.copy_(value)


def _new_memory(p: Tensor, value: Tensor) -> None:
    p.data = value.clone()


def _load(p: Tensor, value: Tensor) -> None:
    module = nn.Module()
    assert isinstance(p, nn.Parameter)
    module.register_parameter("p", p)
    module.load_state_dict({"p": value})


WRITERS = {"in place": _in_place, "through data": _through_data, "new memory": _new_memory, "load_state_dict": _load}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", WRITERS)
@pytest.mark.parametrize("end", ["eval", "step", "state_dict", "posterior"])
def test_written_while_sampled_becomes_the_mean(how: str, end: str, dtype: torch.dtype) -> None:
    writer = WRITERS[how]
    params = make_params([(4, 3), (5,)], dtype=dtype)
    optimizer = new(params, lr=0.0)
    run(optimizer, params, range(2))
    other_mean = optimizer.posterior(params[1]).mean.clone()
    value = torch.arange(12.0).reshape(4, 3).to(dtype)
    optimizer.train()
    quadratic(params).backward()
    writer(params[0], value)
    notice: Callable[[], Any] = {
        "eval": optimizer.eval,
        "step": optimizer.step,
        "state_dict": lambda: optimizer.state_dict()["state"][0]["mean"],
        "posterior": lambda: optimizer.posterior(params[0]).mean,
    }[end]
    with pytest.warns(UserWarning, match="posterior sample"):
        noticed = notice()
    assert noticed is None or torch.equal(noticed.to(dtype), value)
    optimizer.eval()
    assert torch.equal(params[0], value)
    assert torch.equal(optimizer.posterior(params[1]).mean, other_mean), (
        "a neighbour keeps its mean, fp32 bits included"
    )
    optimizer.train()
    writer(params[0], value + 1)  # the second time without a warning (warnings are errors here)
    optimizer.eval()
    assert torch.equal(params[0], value + 1)


def test_written_elements_only() -> None:
    params = make_params([(6,)])
    optimizer = new(params)
    mean = values(params)[0]
    optimizer.train()
    with torch.no_grad():
        params[0][2:4] = 9.0
    with pytest.warns(UserWarning, match="posterior sample"):
        optimizer.eval()
    mean[2:4] = 9.0
    assert torch.equal(params[0], mean)


def test_written_during_a_prediction_becomes_the_mean() -> None:
    params = make_params([(6,)])
    optimizer = new(params)
    with pytest.warns(UserWarning, match="posterior sample"), optimizer.sampled_params(), torch.no_grad():
        params[0].zero_()
    assert not params[0].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("writer", WRITERS.values(), ids=list(WRITERS))
def test_written_in_mean_is_what_trains(writer: Callable[[Tensor, Tensor], None], dtype: torch.dtype) -> None:
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
    optimizer.zero_grad()
    (params[0].sum() * 0 + params[1].sum() * 0).backward()
    optimizer.param_groups[0]["weight_decay"] = 0.0
    for p in params:
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
            normal_of_p = optimizer.posterior(p)
            out += [normal_of_p.mean, normal_of_p.stddev, normal_of_p.variance]
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


def test_posterior_is_a_snapshot_of_the_oracle() -> None:
    params = make_params()
    optimizer, oracle = new(params), Oracle.of(params, HYPER)
    for batch in range(3):
        train_step(optimizer, params, batch)
        oracle.train_step(batch)
    posterior = optimizer.posterior(params[0])
    kept = posterior.mean.clone(), posterior.stddev.clone()
    np.testing.assert_allclose(posterior.stddev.numpy(), oracle.sigma(0), rtol=1e-5)
    np.testing.assert_allclose(posterior.mean.numpy(), oracle.mean[0], rtol=1e-5, atol=1e-6)
    assert not posterior.mean.requires_grad
    assert posterior.sample().shape == params[0].shape
    train_step(optimizer, params, 3)
    assert equal([posterior.mean, posterior.stddev], kept)
    posterior.mean.fill_(9.0)
    assert not (params[0] == 9.0).any()


def test_readings_of_a_fresh_optimizer() -> None:
    params = make_params()
    optimizer = new(params)
    torch.testing.assert_close(optimizer.posterior(params[0]).mean, params[0].detach())
    expected = (HYPER["ess"] * (1.0 + HYPER["weight_decay"])) ** -0.5
    assert optimizer.posterior(params[0]).stddev.numpy() == pytest.approx(expected, rel=1e-6)
    assert new(make_params()).metrics()["step"] == 0.0
    with pytest.raises(ValueError, match="not a parameter"):
        optimizer.posterior(torch.zeros(3))
    with pytest.raises(ValueError, match="pruner"):
        optimizer.rank_table()


def test_step_without_a_sample_warns_once_and_keeps_the_hessian() -> None:
    params = make_params()
    optimizer, oracle = new(params), Oracle.of(params, HYPER)
    for batch in range(3):
        optimizer.zero_grad()
        grads = [gradient(m, i, batch) for i, m in enumerate(oracle.mean)]
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
    import ivon

    peer_params = make_params()
    peer = ivon.IVON(peer_params, lr=0.1, ess=50.0)
    quadratic(peer_params).backward()
    with pytest.raises(TypeError):
        peer.step()


def test_step_on_a_fresh_optimizer_without_gradients() -> None:
    params = make_params()
    optimizer = new(params)
    before = values(params)
    assert optimizer.step() is None  # no gradient anywhere: nothing to warn about
    assert equal(params, before)
    assert optimizer.completed_steps == 1


def test_sample_without_backward_changes_nothing_but_the_count() -> None:
    params = make_params()
    optimizer = new(params)
    before = values(params)
    optimizer.train()
    optimizer.step()
    assert equal(params, before)


def test_step_after_zero_grad_uses_the_gradient_of_the_context() -> None:
    """ivon-opt reads gradients when a context closes, so a loop may clear them before the step."""
    params, others = make_params(), make_params()
    optimizer, usual = new(params), new(others)
    for opt, tensors in ((optimizer, params), (usual, others)):
        with opt.sampled_params(train=True):
            quadratic(tensors).backward()
    optimizer.zero_grad()
    optimizer.step()
    usual.step()
    assert equal(values(params), values(others))
    for p, q in zip(params, others, strict=True):
        assert torch.equal(optimizer.state[p]["hess"], usual.state[q]["hess"])


@pytest.mark.parametrize("without", [1, 2])
def test_three_samples_one_of_them_without_a_gradient(without: int) -> None:
    params, others = make_params([(4,)]), make_params([(4,)])
    optimizer, oracle = new(params), new(others)
    for sample in range(3):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            if sample != without:
                quadratic(params).backward()
        with oracle.sampled_params(train=True):
            oracle.zero_grad()
            (quadratic(others) * (sample != without)).backward()
    optimizer.step()
    oracle.step()
    assert equal(values(params), values(others))
