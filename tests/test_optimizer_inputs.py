"""What the constructor, groups and steps accept, and how they refuse the rest."""

from __future__ import annotations

import copy
import inspect
import math
import re
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from ivon_lora import IVON
from tests.optimizer_problem import equal, make_params, photo, quadratic, run, same_photo, train_step, values

HYPER: dict[str, Any] = {"lr": 0.1, "ess": 50.0}

BAD = [
    *[(name, math.nan) for name in ("lr", "ess", "hess_init", "beta1", "beta2", "weight_decay", "clip_radius")],
    *[(name, math.inf) for name in ("lr", "ess", "hess_init", "beta1", "beta2", "weight_decay")],
    *[(name, -math.inf) for name in ("lr", "clip_radius", "weight_decay")],
    *[(name, -0.1) for name in ("lr", "ess", "hess_init", "beta1", "beta2", "weight_decay", "clip_radius")],
    ("ess", 0.0),
    ("hess_init", 0.0),
    ("beta1", 1.0),
    ("beta1", 1.5),
    ("beta2", 1.0000001),
    ("clip_radius", 0.0),
    ("mc_samples", 0),
    ("mc_samples", -1),
    ("mc_samples", 1.5),
    ("mc_samples", math.nan),
    ("mc_samples", True),
    ("hess_approx", "fisher"),
    ("hess_approx", None),
    ("lr", "fast"),
    ("lr", None),
    ("ess", [1.0]),
]
BOUNDS = {
    "lr": "0",
    "ess": "0",
    "hess_init": "0",
    "beta1": "1",
    "beta2": "1",
    "weight_decay": "0",
    "clip_radius": "0",
    "mc_samples": "1",
    "hess_approx": "price",
}


@pytest.mark.parametrize(("name", "value"), BAD)
@pytest.mark.parametrize("where", ["argument", "group", "added group", "before step", "before train"])
def test_refused_with_name_value_and_bound(name: str, value: Any, where: str) -> None:
    params = make_params([(3,), (2,)])
    optimizer = IVON(params, **HYPER)
    before = photo(optimizer)

    def attempt() -> None:
        if where == "argument":
            IVON(params, **{**HYPER, name: value})
        elif where == "group":
            IVON([{"params": params, name: value}], **HYPER)
        elif where == "added group":
            optimizer.add_param_group({"params": make_params([(4,)]), name: value})
        else:
            optimizer.param_groups[0][name] = value
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.train() if where == "before train" else optimizer.step()

    with pytest.raises(ValueError, match=name) as refused:
        attempt()
    assert repr(value) in str(refused.value)
    if isinstance(value, (int, float)):
        assert BOUNDS[name] in str(refused.value)
    assert len(optimizer.param_groups) == 1
    optimizer.eval()
    assert equal(before["params"], params)
    assert optimizer.completed_steps == 0
    assert all(not s["momentum"].any() for s in photo(optimizer)["state"] if s)


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 0.0},
        {"lr": 0},
        {"beta1": 0.0},
        {"beta2": 0.0},
        {"beta2": 1.0},
        {"weight_decay": 0.0},
        {"clip_radius": math.inf},
        {"clip_radius": 1e-6},
        {"ess": 100},
        {"lr": torch.tensor(0.1)},
        {"sync": True},
        {"seed": 2**64 - 1},
        {"backend": "eager"},
    ],
)
def test_accepted(change: dict[str, Any]) -> None:
    params = make_params()
    optimizer = IVON(params, **{**HYPER, **change})
    run(optimizer, params, range(3))
    assert all(torch.isfinite(p).all() for p in params)


@pytest.mark.parametrize("value", ["100", torch.ones(2), b"1", 1j])
@pytest.mark.parametrize("name", ["lr", "ess"])
def test_values_that_are_not_numbers_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        IVON(make_params(), **{**HYPER, name: value})


@pytest.mark.parametrize("seed", [-1, 2**64, math.nan, 1.5, None, "0"])
def test_seed_is_checked(seed: Any) -> None:
    with pytest.raises(ValueError, match="seed"):
        IVON(make_params(), **HYPER, seed=seed)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"backend.*'cuda'"):
        IVON(make_params(), **HYPER, backend="cuda")


@pytest.mark.parametrize(
    "dtype", [torch.complex64, torch.complex128, torch.int64, torch.int32, torch.bool, torch.uint8]
)
@pytest.mark.parametrize("added", [False, True])
def test_complex_and_integer_parameters_are_refused(dtype: torch.dtype, added: bool) -> None:
    bad = torch.zeros(3, dtype=dtype)
    optimizer = IVON(make_params(), **HYPER)
    refused = pytest.raises(ValueError, match=re.escape(str(dtype)))
    if added:
        with refused:
            optimizer.add_param_group({"params": [bad]})
    else:
        with refused:
            IVON([*make_params(), bad], **HYPER)
    assert len(optimizer.param_groups) == 1


def test_refused_parameter_is_named() -> None:
    with pytest.raises(ValueError, match="embedding"):
        IVON([("weight", make_params()[0]), ("embedding", torch.zeros(3, dtype=torch.int64))], **HYPER)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_duplicates_are_refused() -> None:
    a, b = make_params([(3,), (2,)])
    with pytest.raises(ValueError, match=r"twice|once"):
        IVON([a, b, a], **HYPER)
    with pytest.raises(ValueError, match="more than one parameter group"):
        IVON([{"params": [a]}, {"params": [a, b]}], **HYPER)
    optimizer = IVON([a], **HYPER)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [a]})
    assert len(optimizer.param_groups) == 1


def test_duplicates_are_refused_by_an_error_of_ours_alone() -> None:
    """torch only warns about them; with warnings as errors the ValueError must still be what the user sees."""
    a = make_params([(3,)])[0]
    with pytest.raises(ValueError, match=r"twice|once"):
        IVON([a, a], **HYPER)


def test_no_parameters() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        IVON([], **HYPER)


def test_signature_is_that_of_ivon_opt() -> None:
    import ivon

    theirs = list(inspect.signature(ivon.IVON.__init__).parameters.values())
    ours = list(inspect.signature(IVON.__init__).parameters.values())
    for a, b in zip(theirs, ours, strict=False):
        assert a.name == b.name
        assert a.default == b.default
        assert a.kind == b.kind
    assert all(p.kind == p.KEYWORD_ONLY for p in ours[len(theirs) :])


def test_names_groups_and_generators_give_the_same_run() -> None:
    ends = []
    for kind in ("list", "generator", "named", "groups", "named groups"):
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.linspace(-1, 1, p.numel()).reshape(p.shape))
        named = list(model.named_parameters())
        plain: Any = {
            "list": list(model.parameters()),
            "generator": model.parameters(),
            "named": model.named_parameters(),
            "groups": [{"params": list(model[0].parameters())}, {"params": list(model[1].parameters())}],
            "named groups": [{"params": named[:2]}, {"params": named[2:]}],
        }[kind]
        optimizer = IVON(plain, **HYPER)
        run(optimizer, list(model.parameters()), range(3))
        ends.append(values(list(model.parameters())))
        names = [n for g in optimizer.param_groups for n in g.get("param_names", [])]
        assert names == ([n for n, _ in named] if "named" in kind else [])
    assert all(equal(ends[0], end) for end in ends[1:])


def test_proper_loop_gives_no_warning() -> None:
    """`filterwarnings = error` covers every test; this one says so, with defaults only."""
    params = make_params([(3, 5), (7,)])
    optimizer = IVON(params, lr=0.1, ess=1000)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in range(3):
            train_step(optimizer, params, batch)
            optimizer.eval()
            with optimizer.sampled_params():
                quadratic(params)
            optimizer.metrics()
            optimizer.load_state_dict(optimizer.state_dict())
    assert caught == []


def test_lr_zero_moves_no_mean_but_learns_the_hessian() -> None:
    params = make_params()
    optimizer = IVON(params, lr=0.0, ess=50.0, beta2=0.9)
    before = values(params)
    run(optimizer, params, range(3))
    assert equal(params, before)
    assert all((optimizer.state[p]["hess"] != 1.0).all() for p in params)


def test_lr_tensor_is_read_at_each_step() -> None:
    lr = torch.tensor(0.1)
    params, others = make_params(), make_params()
    optimizer, plain = IVON(params, lr=lr, ess=50.0), IVON(others, lr=0.1, ess=50.0)
    for batch, value in enumerate((0.1, 0.05, 0.0)):
        lr.fill_(value)
        plain.param_groups[0]["lr"] = lr.item()
        train_step(optimizer, params, batch)
        train_step(plain, others, batch)
    assert equal(params, others)
    assert optimizer.param_groups[0]["lr"] is lr


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", ["step", "cosine", "onecycle", "lambda", "plateau", "warmup"])
def test_schedulers(name: str, tensor_lr: bool) -> None:
    """The same lr sequence by a scheduler or by hand gives the same run."""
    schedulers = torch.optim.lr_scheduler
    params, others = make_params(), make_params()
    optimizer = IVON(params, lr=torch.tensor(0.1) if tensor_lr else 0.1, ess=50.0)
    plain = IVON(others, lr=0.1, ess=50.0)
    scheduler: Any = {
        "step": lambda: schedulers.StepLR(optimizer, 2, gamma=0.5),
        "cosine": lambda: schedulers.CosineAnnealingLR(optimizer, 6),
        "onecycle": lambda: schedulers.OneCycleLR(optimizer, max_lr=0.2, total_steps=7, cycle_momentum=False),
        "lambda": lambda: schedulers.LambdaLR(optimizer, lambda k: 1.0 / (1 + k)),
        "plateau": lambda: schedulers.ReduceLROnPlateau(optimizer, patience=0),
        "warmup": lambda: schedulers.LinearLR(optimizer, start_factor=0.1, total_iters=3),
    }[name]()
    seen = set()
    for batch in range(6):
        lr = float(optimizer.param_groups[0]["lr"])
        seen.add(lr)
        plain.param_groups[0]["lr"] = lr
        train_step(optimizer, params, batch)
        train_step(plain, others, batch)
        scheduler.step(1.0) if name == "plateau" else scheduler.step()
    assert len(seen) > 2
    assert equal(params, others)


def test_onecycle_with_momentum_is_refused_by_torch() -> None:
    optimizer = IVON(make_params(), **HYPER)
    with pytest.raises(ValueError, match="momentum"):
        torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=7)


def test_scheduler_and_optimizer_resume_together() -> None:
    def make(seed: int) -> tuple[list[nn.Parameter], IVON, torch.optim.lr_scheduler.LRScheduler]:
        params = make_params(seed=seed)
        optimizer = IVON(params, **HYPER)
        return params, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)

    params, optimizer, scheduler = make(0)
    for batch in range(3):
        train_step(optimizer, params, batch)
        scheduler.step()
    others, resumed, resumed_scheduler = make(1)
    with torch.no_grad():
        for p, q in zip(params, others, strict=True):
            q.copy_(p)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed_scheduler.load_state_dict(scheduler.state_dict())
    for ps, o, s in ((others, resumed, resumed_scheduler), (params, optimizer, scheduler)):
        for batch in range(3, 6):
            train_step(o, ps, batch)
            s.step()
    assert same_photo(photo(optimizer), photo(resumed))


def test_step_hooks_of_torch() -> None:
    """A pre hook sees the sample, a post hook the mean."""
    params = make_params()
    optimizer = IVON(params, **HYPER)
    seen: list[bool] = []
    mean = values(params)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(equal(params, mean)))
    optimizer.register_step_post_hook(
        lambda o, args, kwargs: seen.append(equal(params, [optimizer.posterior(p).mean for p in params]))
    )
    train_step(optimizer, params, 0)
    assert seen == [False, True]
