"""Saving, loading, copying: complete in both states, exact, and independent of the order of loading."""

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from ivon_lora import IVON, VAdam
from tests.compiler import BACKENDS
from tests.golden import of_0_1_0
from tests.optimizer_problem import HYPER, SHAPES, differing, equal, make_params, photo, quadratic, run, values

DTYPES = (torch.float32, torch.bfloat16)


def bag(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.ParameterList:
    """A model that is its parameters."""
    return nn.ParameterList(make_params(SHAPES, dtype, seed))


def new(model: nn.Module, **more: Any) -> IVON:
    return IVON(model.parameters(), **{**HYPER, **more})


def trained(dtype: torch.dtype = torch.float32, steps: int = 3) -> tuple[nn.ParameterList, IVON]:
    model = bag(dtype)
    optimizer = new(model, seed=9)
    run(optimizer, list(model), range(steps))
    return model, optimizer


def through_file(x: Any) -> Any:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def saved_by(model: nn.Module, optimizer: IVON) -> dict[str, Any]:
    saved: dict[str, Any] = through_file({"optimizer": optimizer.state_dict(), "model": model.state_dict()})
    return saved


# ---------------------------------------------------------------- going on

RESUMED = list(itertools.product(DTYPES, (False, True, "prediction"), ("model", "optimizer"), (False, True), (True,)))
RESUMED += [(torch.float64, True, "optimizer", True, True), (torch.float16, False, "model", False, True)]
RESUMED += itertools.product(DTYPES, (False, True), ("optimizer",), (False,), (False,))


@pytest.mark.parametrize(("dtype", "sampled", "first", "attached", "is_fresh"), RESUMED)
def test_resume_is_exact(dtype: torch.dtype, sampled: bool | str, first: str, attached: bool, is_fresh: bool) -> None:
    """In any state, loaded in any order. Attached, the model's state dict holds the mean; otherwise a live sample."""
    model, optimizer = trained(dtype)
    if attached:
        optimizer.attach(model)
    mean = values(list(model))
    if sampled == "prediction":
        with optimizer.sampled_params():
            saved = saved_by(model, optimizer)
    else:
        if sampled:
            optimizer.train()
        saved = saved_by(model, optimizer)
    fresh = bag(dtype, seed=1)
    loaded = new(fresh, seed=0)
    if not is_fresh:  # they themselves, which have gone on, and hold a sample
        fresh, loaded = model, optimizer
        run(optimizer, list(model), range(3, 5))
        optimizer.train()
        quadratic(list(model)).backward()
    for part in ("model", "optimizer") if first == "model" else ("optimizer", "model"):
        (fresh if part == "model" else loaded).load_state_dict(saved[part])
    if attached:  # otherwise nobody looks, and training goes on at once
        loaded.eval()
        assert equal(list(fresh), mean)
    assert (loaded.seed, loaded.completed_steps) == (9, 3)
    run(loaded, list(fresh), range(3, 6))
    assert differing(photo(loaded), photo(trained(dtype, 6)[1])) == []


def test_other_weights_loaded_after_the_optimizer_are_the_mean() -> None:
    _, optimizer = trained()
    optimizer.train()
    fresh, other = bag(seed=1), bag(seed=2)
    loaded = new(fresh)
    loaded.load_state_dict(through_file(optimizer.state_dict()))
    fresh.load_state_dict(other.state_dict())
    for _ in range(2):
        loaded.eval()
        assert equal(list(fresh), list(other))
        loaded.train()


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(("saved_dtype", "dtype"), [*itertools.permutations(DTYPES)])
def test_state_is_fp32_whatever_the_parameters_are(saved_dtype: torch.dtype, dtype: torch.dtype, sampled: bool) -> None:
    """torch's own `load_state_dict` would round it to the parameter's dtype. The run may go on in another precision."""
    model, optimizer = trained(saved_dtype)
    hess = [optimizer.state[p]["hess"].clone() for p in model]
    assert any((h.bfloat16().float() != h).any() for h in hess), "the test needs bits beyond bf16"
    mean = [optimizer.posterior(p).mean for p in model]
    if sampled:
        optimizer.train()
    saved = saved_by(model, optimizer)
    fresh = bag(dtype, seed=1)
    loaded = new(fresh)
    fresh.load_state_dict(saved["model"])
    loaded.load_state_dict(saved["optimizer"])
    assert equal([loaded.state[p]["hess"] for p in fresh], hess)
    assert equal(list(fresh), [m.to(dtype) for m in mean])
    run(loaded, list(fresh), range(3, 5))
    assert all(loaded.state[p]["hess"].dtype == torch.float32 for p in fresh)


@pytest.mark.parametrize("live", [False, True])
def test_vadam_and_its_pruner_resume_exactly(live: bool) -> None:
    params, optimizer = of_0_1_0.make("vadam")
    of_0_1_0.advance(params, optimizer, range(12))
    if live:
        optimizer.train()
    saved = pickle.loads(pickle.dumps((optimizer.state_dict(), values(params))))
    others, resumed = of_0_1_0.make("vadam", seed=0)
    resumed.load_state_dict(saved[0])
    torch._foreach_copy_([p.data for p in others], saved[1])
    runs = [(params, optimizer), (others, resumed), copy.deepcopy((params, optimizer))]
    for each in runs:
        of_0_1_0.advance(*each, range(12, 25))
        assert differing(photo(each[1]), photo(optimizer)) == []
    assert not optimizer.state[params[0]]["rank_mask"].all()
    assert optimizer.param_groups[0]["examples_seen"] == 25 * 8


# ---------------------------------------------------------------- of version 0.1.0


@pytest.mark.parametrize("kind", of_0_1_0.KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_of_0_1_0_goes_on_with_its_bits(backend: str, kind: str, recwarn: pytest.WarningsRecorder) -> None:
    """Its groups have step_rule, antithetic and prior, hess_init="auto" and hess_approx="fisher" for VAdam.

    For VAdam it goes on under the prior of the group, from the mean. (Its sample was drawn under others: weights that
    are loaded last, and hold it, would be taken for the mean.)
    """
    saved = torch.load(of_0_1_0.FILE, weights_only=True)[kind]
    params, optimizer = of_0_1_0.make(kind, backend, seed=0)
    assert isinstance(optimizer, VAdam) == (kind == "vadam")
    if kind != "vadam":
        optimizer.load_state_dict(saved["optimizer"])
    with torch.no_grad():
        for p, value in zip(params, saved["weights"], strict=True):
            p.copy_(value)
    if kind == "vadam":
        for _ in range(2):  # the second time it says nothing
            optimizer.load_state_dict(saved["optimizer"])
        assert len(recwarn) == 1
        assert "a prior for every tensor" in str(recwarn.pop().message)
    of_0_1_0.advance(params, optimizer, range(of_0_1_0.SAVED, of_0_1_0.END))
    for found, expected in zip(of_0_1_0.snapshot(params, optimizer), saved["end"], strict=True):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("price", {"antithetic": True}, "group 1 of the state dict was saved with antithetic=True, which is gone"),
        ("price", {"beta2": "auto", "hess_init": "auto"}, "saved with beta2='auto', hess_init='auto', which is gone"),
        ("vadam", {"step_rule": "newton"}, "saved with step_rule='newton', which is gone"),
    ],
)
def test_options_of_0_1_0_that_are_gone_are_named(kind: str, change: dict[str, Any], message: str) -> None:
    saved = torch.load(of_0_1_0.FILE, weights_only=True)[kind]["optimizer"]
    saved["param_groups"][1].update(change)
    _, optimizer = of_0_1_0.make(kind)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert optimizer.completed_steps == 0


# ---------------------------------------------------------------- copies


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state", ["fresh", "mean", "sampled", "sampled with gradients", "two contexts", "prediction"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_go_on_identically(dtype: torch.dtype, state: str, how: str) -> None:
    model, optimizer = trained(dtype, 0 if state == "fresh" else 2)
    duplicate: Callable[[Any], Any] = copy.deepcopy if how == "deepcopy" else lambda x: pickle.loads(pickle.dumps(x))
    with_gradients = state in ("sampled with gradients", "two contexts")
    if state.startswith("sampled"):
        optimizer.train()
    optimizer.zero_grad()
    if state == "sampled with gradients":
        quadratic(list(model), 2).backward()
    elif state == "two contexts":
        for _ in range(2):
            with optimizer.sampled_params(train=True):
                quadratic(list(model), 2).backward()
    with optimizer.sampled_params() if state == "prediction" else nullcontext():
        twin_model, twin = duplicate((model, optimizer))
    if state == "prediction":
        twin.eval()
    if with_gradients:  # pickle, as torch does it, drops p.grad
        for p, q in zip(model, twin_model, strict=True):
            assert p.grad is not None
            q.grad = p.grad.clone()
    assert all(q in twin.state for q in twin_model) or state == "fresh"
    for o, tensors in ((optimizer, list(model)), (twin, list(twin_model))):
        if with_gradients:
            o.step()
        run(o, tensors, range(3, 5))
        with o.sampled_params(train=True):
            o.zero_grad()
            quadratic(tensors, 5).backward()
        o.step()
    assert differing(photo(optimizer), photo(twin)) == []
    with optimizer.sampled_params(), twin.sampled_params():
        assert equal(list(model), list(twin_model))


# ---------------------------------------------------------------- form, and what does not fit


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("param_groups",), [], "has 0 parameter groups, the optimizer 1"),
        (("param_groups", 0, "params"), [0], "group 0 of the state dict has 1 parameters, the optimizer's 4"),
        (("param_groups", 0, "lr"), -1.0, r"lr must lie in \[0, inf\), got -1.0"),
        (("param_groups", 0, "algorithm"), "vadam", "group 0 of the state dict was saved by VAdam: load it into"),
        (("state", 0), {"hess": torch.ones(3, 5)}, "not IVON's momentum and hess"),
        (("state", "0"), {}, "has the state of a parameter '0', which is in no group"),
        (("state", 0, "hess"), torch.ones(2), r"hess of parameter 0 is \(2,\), the parameter \(3, 5\)"),
        (("state", 0, "hess", 0), torch.nan, "hess of parameter 0 is not finite: the checkpoint is damaged"),
        (("state", 2, "step"), torch.ones(2), r"step of parameter 2 is \(2,\), not a tensor of one element"),
    ],
)
def test_a_state_dict_that_does_not_fit_changes_nothing(place: tuple[Any, ...], value: Any, message: str) -> None:
    _, optimizer = trained()
    saved: Any = copy.deepcopy(optimizer.state_dict())
    optimizer.train()
    before, folder = photo(optimizer), saved
    for name in place[:-1]:
        folder = folder[name]
    folder[place[-1]] = value
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert differing(photo(optimizer), before) == []


def test_state_dict_has_pytorchs_form() -> None:
    model, fresh = bag(), bag(seed=1)
    optimizer = IVON(model.named_parameters(), **HYPER)
    run(optimizer, list(model), range(1))
    saved = optimizer.state_dict()
    assert set(saved) == {"state", "param_groups"}
    assert set(saved["state"]) == set(range(len(SHAPES)))
    assert saved["param_groups"][0]["param_names"] == [n for n, _ in model.named_parameters()]
    for group in saved["param_groups"]:
        for key, value in group.items():
            assert key in ("params", "param_names") or value is None or isinstance(value, (int, float, bool, str)), key
    loaded = IVON(fresh.named_parameters(), **HYPER)
    loaded.load_state_dict(saved)
    assert not any("live_sample" in o.param_groups[0] for o in (optimizer, loaded))
    assert set(optimizer.state) == set(model), "no string keys"


def test_hooks_of_state_dicts_are_honoured() -> None:
    model, optimizer = trained()
    loaded = IVON(list(model)[::-1], **HYPER)

    def in_reverse(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        (group,) = state_dict["param_groups"]
        return {"state": state_dict["state"], "param_groups": [{**group, "params": group["params"][::-1]}]}

    seen: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("saving"))
    optimizer.register_state_dict_post_hook(lambda o, state_dict: {**state_dict, "note": "mine"})
    saved = through_file(optimizer.state_dict())
    loaded.register_load_state_dict_pre_hook(in_reverse)
    loaded.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    loaded.load_state_dict(saved)
    assert (saved["note"], seen) == ("mine", ["saving", "loaded"])
    assert all(torch.equal(optimizer.state[p]["hess"], loaded.state[p]["hess"]) for p in model)


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)])
@pytest.mark.parametrize("kind", ["ivon", "vadam"])
def test_rehearsal_step_creates_all_state_and_moves_nothing(kind: str, lr: float | torch.Tensor) -> None:
    """What `_init_optim_state` does to a fresh optimizer: gradients of zero, lr 0. It needs no count of examples."""
    from torch.distributed.checkpoint.state_dict import _init_optim_state

    params = make_params()
    optimizer = IVON(params, **{**HYPER, "lr": lr}) if kind == "ivon" else VAdam(params, lr, num_examples=10)
    before = values(params)
    _init_optim_state(optimizer)
    assert equal(params, before)
    for p in params:
        assert {"step", "momentum", "hess"} <= set(optimizer.state[p])
        assert not optimizer.state[p]["momentum"].any()
        assert (optimizer.state[p]["hess"] == (1.0 if kind == "ivon" else 0.0)).all()
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.1)
    assert all(p.grad is None for p in params)
