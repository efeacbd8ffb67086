"""Saving, loading, copying: complete in both states, exact, and independent of the order of loading."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ivon_lora import IVON
from tests.optimizer_problem import SHAPES, equal, make_params, photo, quadratic, run, same_photo, values

HYPER: dict[str, Any] = {"lr": 0.1, "ess": 50.0, "beta2": 0.99, "weight_decay": 0.01}


class Model(nn.Module):
    """A bag of parameters, so that there is a `state_dict`."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        self.bag = nn.ParameterList(make_params(SHAPES, dtype, seed))

    @property
    def tensors(self) -> list[nn.Parameter]:
        return list(self.bag)


def new(model: Model, **more: Any) -> IVON:
    return IVON(model.parameters(), **{**HYPER, **more})


def through_file(x: Any) -> Any:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def uninterrupted(dtype: torch.dtype, steps: int) -> dict[str, Any]:
    model = Model(dtype)
    optimizer = new(model, seed=9)
    run(optimizer, model.tensors, range(steps))
    return photo(optimizer)


BOTH_STATES = [
    (torch.float32, False),
    (torch.float32, True),
    (torch.bfloat16, False),
    (torch.bfloat16, True),
]


def _ways_to_resume() -> list[Any]:
    out = []
    for dtype, sampled, order, guard in itertools.product(
        (torch.float32, torch.bfloat16), (False, True, "prediction"), ("model first", "optimizer first"), (False, True)
    ):
        out.append((dtype, sampled, order, guard))
    return [*out, (torch.float64, True, "optimizer first", True), (torch.float16, False, "model first", False)]


@pytest.mark.parametrize(("dtype", "sampled", "order", "guard"), _ways_to_resume())
def test_resume_is_exact(dtype: torch.dtype, sampled: bool | str, order: str, guard: bool) -> None:
    """Save after 3 steps in any state, load into fresh objects in any order: 3 more steps end bit for bit the same."""
    model = Model(dtype)
    optimizer = new(model, seed=9)
    if guard:
        optimizer.attach(model)
    run(optimizer, model.tensors, range(3))
    mean = values(model.tensors)
    if sampled == "prediction":
        with optimizer.sampled_params():
            saved = through_file({"optimizer": optimizer.state_dict(), "model": model.state_dict()})
    else:
        if sampled:
            optimizer.train()
        saved = through_file({"optimizer": optimizer.state_dict(), "model": model.state_dict()})
    fresh = Model(dtype, seed=1)
    loaded = new(fresh, seed=0)
    for part in ("model", "optimizer") if order == "model first" else ("optimizer", "model"):
        (fresh if part == "model" else loaded).load_state_dict(saved[part])
    loaded.eval()
    assert equal(fresh.tensors, mean)
    assert loaded.seed == 9
    assert loaded.completed_steps == 3
    run(loaded, fresh.tensors, range(3, 6))
    if sampled == "prediction":  # one prediction draw more than the uninterrupted run: the weights are the same
        assert equal(fresh.tensors, uninterrupted(dtype, 6)["params"])
    else:
        assert same_photo(photo(loaded), uninterrupted(dtype, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizer_first_then_the_model_with_a_sample_trains_without_eval(dtype: torch.dtype) -> None:
    model = Model(dtype)
    optimizer = new(model, seed=9)
    run(optimizer, model.tensors, range(3))
    optimizer.train()
    saved = through_file({"optimizer": optimizer.state_dict(), "model": model.state_dict()})
    fresh = Model(dtype, seed=1)
    loaded = new(fresh)
    loaded.load_state_dict(saved["optimizer"])
    fresh.load_state_dict(saved["model"])
    run(loaded, fresh.tensors, range(3, 6))
    assert same_photo(photo(loaded), uninterrupted(dtype, 6))


def test_other_weights_loaded_after_the_optimizer_are_the_mean() -> None:
    """A warm start: nothing of the checkpoint's mean may overwrite them."""
    model = Model()
    optimizer = new(model)
    run(optimizer, model.tensors, range(2))
    optimizer.train()
    saved = through_file(optimizer.state_dict())
    fresh = Model(seed=1)
    loaded = new(fresh)
    loaded.load_state_dict(saved)
    other = Model(seed=2)
    fresh.load_state_dict(other.state_dict())
    loaded.eval()
    assert equal(fresh.tensors, other.tensors)
    loaded.train()
    loaded.eval()
    assert equal(fresh.tensors, other.tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_into_an_optimizer_that_has_a_sample_ends_in_mean(dtype: torch.dtype) -> None:
    model = Model(dtype)
    optimizer = new(model, seed=9)
    run(optimizer, model.tensors, range(3))
    saved = through_file({"optimizer": optimizer.state_dict(), "model": model.state_dict()})
    run(optimizer, model.tensors, range(3, 5))
    optimizer.train()
    quadratic(model.tensors).backward()
    optimizer.load_state_dict(saved["optimizer"])
    assert all("mean" not in optimizer.state[p] or p.dtype == torch.bfloat16 for p in model.tensors)
    model.load_state_dict(saved["model"])
    run(optimizer, model.tensors, range(3, 6))
    assert same_photo(photo(optimizer), uninterrupted(dtype, 6))


@pytest.mark.parametrize(("dtype", "sampled"), BOTH_STATES)
def test_own_state_dict_goes_in_again(dtype: torch.dtype, sampled: bool) -> None:
    """Accelerate does this in `prepare`."""
    model = Model(dtype)
    optimizer = new(model, seed=9)
    run(optimizer, model.tensors, range(3))
    mean = values(model.tensors)
    if sampled:
        optimizer.train()
    optimizer.load_state_dict(optimizer.state_dict())
    assert equal(model.tensors, mean)
    run(optimizer, model.tensors, range(3, 6))
    assert same_photo(photo(optimizer), uninterrupted(dtype, 6))


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.bfloat16,
    ],
)
def test_state_dict_of_a_sample_stays_complete_after_eval(dtype: torch.dtype) -> None:
    model = Model(dtype)
    optimizer = new(model, seed=9)
    run(optimizer, model.tensors, range(3))
    mean = values(model.tensors)
    optimizer.train()
    state_dict, weights = optimizer.state_dict(), copy.deepcopy(model.state_dict())
    optimizer.eval()
    saved = through_file({"optimizer": state_dict, "model": weights})
    fresh = Model(dtype, seed=1)
    loaded = new(fresh)
    fresh.load_state_dict(saved["model"])
    loaded.load_state_dict(saved["optimizer"])
    assert equal(fresh.tensors, mean)


def test_two_optimizers_do_not_share_what_was_loaded() -> None:
    model, second = Model(), Model()
    optimizer, other = new(model, seed=9), new(second)
    run(optimizer, model.tensors, range(3))
    second.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    run(optimizer, model.tensors, range(3, 6))
    assert [other.state[p]["step"].item() for p in second.tensors] == [3.0] * len(SHAPES)
    run(other, second.tensors, range(3, 6))
    assert same_photo(photo(optimizer), uninterrupted(torch.float32, 6))
    assert same_photo(photo(other), uninterrupted(torch.float32, 6))


@pytest.mark.parametrize(
    ("saved_dtype", "sampled"),
    [
        (torch.float32, False),
        (torch.float32, True),
        (torch.bfloat16, False),
        (torch.bfloat16, True),
    ],
)
def test_checkpoint_of_another_precision(saved_dtype: torch.dtype, sampled: bool) -> None:
    """State stays fp32 when the same run goes on in the other of fp32 and bf16."""
    dtype = torch.bfloat16 if saved_dtype == torch.float32 else torch.float32
    model = Model(saved_dtype)
    optimizer = new(model, seed=9)
    run(optimizer, model.tensors, range(3))
    hess = [optimizer.state[p]["hess"].clone() for p in model.tensors]
    mean = [optimizer.posterior(p).mean for p in model.tensors]
    if sampled:
        optimizer.train()
    saved = through_file({"optimizer": optimizer.state_dict(), "model": model.state_dict()})
    fresh = Model(dtype, seed=1)
    loaded = new(fresh)
    fresh.load_state_dict(saved["model"])
    loaded.load_state_dict(saved["optimizer"])
    assert equal([loaded.state[p]["hess"] for p in fresh.tensors], hess)
    assert equal(fresh.tensors, [m.to(dtype) for m in mean])
    run(loaded, fresh.tensors, range(3, 5))
    assert all(loaded.state[p]["hess"].dtype == torch.float32 for p in fresh.tensors)


def test_fp32_state_of_16_bit_parameters_survives() -> None:
    """torch's own `load_state_dict` rounds it to the parameter's dtype."""
    model = Model(torch.bfloat16)
    optimizer = new(model)
    run(optimizer, model.tensors, range(5))
    state = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in model.tensors]
    assert any((s["hess"].bfloat16().float() != s["hess"]).any() for s in state), "the test needs bits beyond bf16"
    fresh = Model(torch.bfloat16, seed=1)
    loaded = new(fresh)
    fresh.load_state_dict(model.state_dict())
    loaded.load_state_dict(through_file(optimizer.state_dict()))
    for p, expected in zip(fresh.tensors, state, strict=True):
        for name in ("momentum", "hess", "mean"):
            assert loaded.state[p][name].dtype == torch.float32
            assert torch.equal(loaded.state[p][name], expected[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "state",
    [
        "fresh",
        "mean",
        "sampled",
        "sampled with gradients",
        "two contexts",
        "prediction",
    ],
)
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_go_on_identically(dtype: torch.dtype, state: str, how: str) -> None:
    model = Model(dtype)
    optimizer = new(model, seed=4)
    duplicate: Callable[[Any], Any] = copy.deepcopy if how == "deepcopy" else lambda x: pickle.loads(pickle.dumps(x))
    if state != "fresh":
        run(optimizer, model.tensors, range(2))
    if state.startswith("sampled"):
        optimizer.train()
        if state.endswith("gradients"):
            optimizer.zero_grad()
            quadratic(model.tensors, 2).backward()
    elif state == "two contexts":
        optimizer.zero_grad()
        for _ in range(2):
            with optimizer.sampled_params(train=True):
                quadratic(model.tensors, 2).backward()
    if state == "prediction":
        with optimizer.sampled_params():
            twin_model, twin = duplicate((model, optimizer))
        twin.eval()
    else:
        twin_model, twin = duplicate((model, optimizer))
    if state in ("sampled with gradients", "two contexts"):  # pickle, as torch does it, drops p.grad
        for p, q in zip(model.tensors, twin_model.tensors, strict=True):
            assert p.grad is not None
            q.grad = p.grad.clone()
    assert all(q in twin.state for q in twin_model.tensors) or state == "fresh"
    for o, tensors in ((optimizer, model.tensors), (twin, twin_model.tensors)):
        if state in ("sampled with gradients", "two contexts"):
            o.step()
        run(o, tensors, range(3, 5))
        with o.sampled_params(train=True):
            o.zero_grad()
            quadratic(tensors, 5).backward()
        o.step()
    assert same_photo(photo(optimizer), photo(twin))
    with optimizer.sampled_params(), twin.sampled_params():
        assert equal(model.tensors, twin_model.tensors)


def test_copy_keeps_the_count_of_skipped_elements() -> None:
    params = make_params([(5,)])
    optimizer = IVON(params, **HYPER)
    optimizer.train()
    params[0].grad = torch.tensor([1.0, torch.nan, 1.0, 1.0, 1.0])
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    assert twin.metrics() == optimizer.metrics()


def test_deepcopy_is_independent() -> None:
    model = Model()
    optimizer = new(model)
    run(optimizer, model.tensors, range(2))
    optimizer.train()
    before = photo(optimizer)
    twin_model, twin = copy.deepcopy((model, optimizer))
    run(twin, twin_model.tensors, range(3))
    assert same_photo(photo(optimizer), before)


@pytest.mark.parametrize(
    "damage",
    [
        "adamw",
        "groups",
        "parameters",
        "shape",
        "nan",
        "lr",
        "missing",
        "not a dict",
        "no state",
    ],
)
def test_state_dict_that_does_not_fit_is_refused_and_nothing_changes(damage: str) -> None:
    model = Model()
    optimizer = new(model)
    run(optimizer, model.tensors, range(2))
    saved: Any = copy.deepcopy(optimizer.state_dict())
    optimizer.train()
    before = photo(optimizer)
    if damage == "adamw":
        adamw = torch.optim.AdamW(model.parameters())
        quadratic(model.tensors).backward()
        saved = adamw.state_dict()
    elif damage == "groups":
        saved["param_groups"].append(saved["param_groups"][0])
    elif damage == "parameters":
        saved["param_groups"][0]["params"].pop()
    elif damage == "shape":
        saved["state"][0]["hess"] = torch.ones(2)
    elif damage == "nan":
        saved["state"][0]["hess"][0] = torch.nan
    elif damage == "lr":
        saved["param_groups"][0]["lr"] = -1.0
    elif damage == "missing":
        del saved["param_groups"][0]["ess"]
    elif damage == "not a dict":
        saved = [1, 2]
    elif damage == "no state":
        del saved["state"]
    with pytest.raises(ValueError):  # noqa: PT011 - the messages are as various as the damage
        optimizer.load_state_dict(saved)
    assert same_photo(photo(optimizer), before)


def test_state_dict_has_pytorchs_form() -> None:
    model = Model()
    optimizer = IVON(model.named_parameters(), **HYPER)
    run(optimizer, model.tensors, range(1))
    saved = optimizer.state_dict()
    assert set(saved) == {"state", "param_groups"}
    assert set(saved["state"]) == set(range(len(SHAPES)))
    assert saved["param_groups"][0]["param_names"] == [n for n, _ in model.named_parameters()]
    for group in saved["param_groups"]:
        for key, value in group.items():
            assert key in ("params", "param_names") or value is None or isinstance(value, (int, float, bool, str)), key
    assert "live_sample" not in optimizer.param_groups[0]
    loaded = IVON(Model(seed=1).named_parameters(), **HYPER)
    loaded.load_state_dict(saved)
    assert "live_sample" not in loaded.param_groups[0]
    assert set(optimizer.state) == set(model.tensors), "no string keys"


def test_load_pre_hook_is_honoured() -> None:
    """The hook that torch's documentation offers for a checkpoint whose parameters have another order."""
    model = Model()
    optimizer = IVON(model.named_parameters(), **HYPER)
    run(optimizer, model.tensors, range(2))
    saved = through_file(optimizer.state_dict())
    fresh = Model(seed=1)
    fresh.load_state_dict(model.state_dict())
    names = [n for n, _ in fresh.named_parameters()][::-1]
    loaded = IVON([(n, fresh.get_parameter(n)) for n in names], **HYPER)

    def by_name(opt: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        adapted: dict[str, Any] = copy.deepcopy(state_dict)
        group = adapted["param_groups"][0]
        ids = dict(zip(group["param_names"], group["params"], strict=True))
        group["params"] = [ids[n] for n in names]
        group["param_names"] = names
        return adapted

    loaded.register_load_state_dict_pre_hook(by_name)
    loaded.load_state_dict(saved)
    for p, q in zip(model.tensors, fresh.tensors, strict=True):
        assert torch.equal(optimizer.state[p]["hess"], loaded.state[q]["hess"])


def test_frozen_parameters_have_no_state_and_load_back_without() -> None:
    model = Model()
    model.tensors[1].requires_grad_(False)
    optimizer = new(model)
    run(optimizer, model.tensors, range(2))
    saved = through_file(optimizer.state_dict())
    assert 1 not in saved["state"]
    fresh = Model(seed=1)
    fresh.tensors[1].requires_grad_(False)
    fresh.load_state_dict(model.state_dict())
    loaded = new(fresh)
    loaded.load_state_dict(saved)
    for o, tensors in ((optimizer, model.tensors), (loaded, fresh.tensors)):
        tensors[1].requires_grad_(True)
        run(o, tensors, range(2, 4))
    assert same_photo(photo(optimizer), photo(loaded))


# ---------------------------------------------------------------- torch.distributed.checkpoint


@pytest.mark.parametrize(("dtype", "sampled"), BOTH_STATES)
def test_distributed_checkpoint_api(dtype: torch.dtype, sampled: bool) -> None:
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    model = Model(dtype)
    optimizer = new(model, seed=9)
    run(optimizer, model.tensors, range(3))
    if sampled:
        optimizer.train()
    saved = through_file(
        {"optimizer": get_optimizer_state_dict(model, optimizer), "model": get_model_state_dict(model)}
    )
    assert {"momentum", "hess", "step"} <= set(saved["optimizer"]["state"]["bag.0"])
    fresh = Model(dtype, seed=1)
    loaded = new(fresh)
    set_model_state_dict(fresh, saved["model"])
    set_optimizer_state_dict(fresh, loaded, saved["optimizer"])
    run(loaded, fresh.tensors, range(3, 6))
    assert same_photo(photo(loaded), uninterrupted(dtype, 6))


def test_distributed_checkpoint_of_the_peer_fails() -> None:
    import ivon
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = Model()
    peer = ivon.IVON(model.parameters(), lr=0.1, ess=50.0)
    with pytest.raises((KeyError, AssertionError)):
        get_optimizer_state_dict(model, peer)


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_rehearsal_step_creates_all_state_and_moves_nothing(tensor_lr: bool) -> None:
    """What `_init_optim_state` does to a fresh optimizer; no warning either (they are errors here)."""
    from torch.distributed.checkpoint.state_dict import _init_optim_state

    model = Model()
    optimizer = new(model, lr=torch.tensor(0.1) if tensor_lr else 0.1)
    before = values(model.tensors)
    _init_optim_state(optimizer)
    assert equal(model.tensors, before)
    for p in model.tensors:
        assert {"step", "momentum", "hess"} <= set(optimizer.state[p])
        assert not optimizer.state[p]["momentum"].any()
        assert (optimizer.state[p]["hess"] == 1.0).all()
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.1)
    assert all(p.grad is None for p in model.tensors)


def test_saved_twice_is_the_same() -> None:
    model = Model()
    optimizer = new(model)
    run(optimizer, model.tensors, range(2))
    optimizer.train()
    first, second = through_file(optimizer.state_dict()), through_file(optimizer.state_dict())
    assert first["param_groups"] == second["param_groups"]
    for i in first["state"]:
        assert all(torch.equal(first["state"][i][k], second["state"][i][k]) for k in first["state"][i])


def test_peer_forgets_the_step_on_resume() -> None:
    """ivon-opt restarts its bias correction after a resume; ours goes on (test_resume_is_exact)."""
    import ivon

    ends: list[list[Tensor]] = []
    for interrupted in (False, True):
        params = make_params([(8,)])
        peer = ivon.IVON(params, lr=0.1, ess=1e12)
        for batch in range(6):
            if interrupted and batch == 3:
                resumed = ivon.IVON(params, lr=0.1, ess=1e12)
                resumed.load_state_dict(peer.state_dict())
                peer = resumed
            with peer.sampled_params(train=True):
                peer.zero_grad()
                quadratic(params, batch).backward()
            peer.step()
        ends.append(values(params))
    assert not torch.allclose(ends[0][0], ends[1][0], rtol=1e-2)
