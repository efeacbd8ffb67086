"""What the constructor, groups and steps accept, and how they refuse the rest."""

import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ivon_lora import IVON, VAdam
from tests.optimizer_problem import equal, make_params, run, values

HYPER: dict[str, Any] = {"lr": 0.1, "ess": 50.0}

BAD = [
    *[(name, math.nan) for name in ("lr", "ess", "hess_init", "beta1", "beta2", "weight_decay", "clip_radius")],
    *[(name, math.inf) for name in ("lr", "ess", "hess_init", "beta1", "beta2", "weight_decay")],
    *[(name, -math.inf) for name in ("lr", "clip_radius", "weight_decay")],
    *[(name, -0.1) for name in ("lr", "ess", "hess_init", "beta1", "beta2", "weight_decay", "clip_radius")],
    *[(name, 0.0) for name in ("ess", "hess_init", "clip_radius")],
    *[("beta1", 1.0), ("beta1", 1.5), ("beta2", 1.0000001)],
    *[("mc_samples", value) for value in (0, -1, 1.5, math.nan, True)],
    *[("hess_approx", value) for value in ("fisher", None)],
    *[(name, value) for name in ("lr", "ess") for value in ("fast", "100", None, [1.0], torch.ones(2), b"1", 1j)],
    *[("maximize", value) for value in (1, None)],
]
BOUNDS = {"beta1": "1", "beta2": "1", "mc_samples": "1", "hess_approx": "price", "maximize": "True"}


@pytest.mark.parametrize(("name", "value"), BAD)
@pytest.mark.parametrize("where", ["argument", "group", "added group", "before step", "before train"])
def test_refused_with_name_value_and_bound(name: str, value: Any, where: str) -> None:
    params = make_params([(3,), (2,)])
    optimizer = IVON(params, **HYPER)
    before = values(params)
    if where.startswith("before"):
        optimizer.param_groups[0][name] = value
        for p in params:
            p.grad = torch.ones_like(p)
    attempt: dict[str, Callable[[], Any]] = {
        "argument": lambda: IVON(params, **{**HYPER, name: value}),
        "group": lambda: IVON([{"params": params, name: value}], **HYPER),
        "added group": lambda: optimizer.add_param_group({"params": make_params([(4,)]), name: value}),
        "before step": optimizer.step,
        "before train": optimizer.train,
    }
    with pytest.raises(ValueError, match=name) as refused:
        attempt[where]()
    assert repr(value) in str(refused.value)
    if isinstance(value, (int, float)):
        assert BOUNDS.get(name, "0") in str(refused.value)
    assert len(optimizer.param_groups) == 1
    optimizer.eval()
    assert equal(before, params)
    assert optimizer.completed_steps == 0
    assert not any(state["momentum"].any() for state in optimizer.state.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_examples": 0}, "num_examples must be the number of training examples, an integer of at least 1, got 0"),
        ({"temperature": 0.0}, r"temperature must lie in \(0, inf\), got 0.0"),
        ({"prior_std": -1.0}, r"prior_std must lie in \(0, inf\), got -1.0"),
        ({"batch_size": 0}, "batch_size must be 'auto' or the number of examples .*at least 1, got 0"),
        ({"batch_size": 2.5}, "batch_size must be .*got 2.5"),
        ({"noise_warmup": -1}, "noise_warmup must be a number of examples, .*got -1"),
        ({"betas": (0.9, 1.5)}, r"beta2 must lie in \[0, 1\], got 1.5"),
        ({"lr": -1.0}, r"lr must lie in \[0, inf\), got -1.0"),
        ({"lr_limit": "none"}, "lr_limit must be 'auto', a number or None, got 'none'"),
        ({"lr_limit": -1.0}, r"lr_limit must lie in \(0, inf\], got -1.0"),
    ],
)
@pytest.mark.parametrize("where", ["argument", "group"])
def test_vadam_refuses_with_name_value_and_bound(options: dict[str, Any], message: str, where: str) -> None:
    params, group = make_params([(3, 2)]), {}
    if where == "group" and options.keys() & {"lr", "betas", "prior_std", "lr_limit"}:
        options, group = {}, options
    with pytest.raises(ValueError, match=message):
        VAdam([{"params": params, **group}], **{"num_examples": 10, **options})


@pytest.mark.parametrize(
    "change",
    [
        *({"lr": value} for value in (0.0, 0, np.float32(0.1), np.array(0.1), torch.tensor(0.1))),
        *({"beta1": 0.0}, {"beta2": 0.0}, {"beta2": 1.0}, {"weight_decay": 0.0}, {"sync": True}, {"backend": "eager"}),
        *({"clip_radius": math.inf}, {"clip_radius": 1e-6}, {"ess": 100}, {"ess": np.int64(100)}),
        *({"seed": 2**64 - 1}, {"seed": np.uint64(3)}, {"mc_samples": np.int32(2)}),
    ],
    ids=str,
)
def test_accepted(change: dict[str, Any]) -> None:
    """Numbers of numpy become Python's, so that the state dict is one that ``torch.load`` takes."""
    params = make_params()
    optimizer = IVON(params, **{**HYPER, **change})
    run(optimizer, params, range(3))
    assert all(torch.isfinite(p).all() for p in params)
    assert not any(isinstance(value, np.generic) for value in optimizer.state_dict()["param_groups"][0].values())


def test_vadam_takes_numbers_of_numpy_and_torch() -> None:
    ends = []
    kind: Any
    for kind in (int, np.int64, np.array, torch.tensor):
        params = make_params()
        optimizer = VAdam(params, num_examples=kind(64), batch_size=kind(8), noise_warmup=kind(16), seed=kind(3))
        run(optimizer, params, range(12))
        ends.append(values(params))
        saved = optimizer.state_dict()["param_groups"][0]
        assert not any(isinstance(value, np.generic | np.ndarray | torch.Tensor) for value in saved.values())
    assert all(equal(end, ends[0]) for end in ends)


@pytest.mark.parametrize(
    ("name", "value"), [*(("seed", seed) for seed in (-1, 2**64, math.nan, 1.5, None, "0", True)), ("backend", "cuda")]
)
def test_seed_and_backend_are_checked(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name) as refused:
        IVON(make_params(), **HYPER, **{name: value})
    assert repr(value) in str(refused.value)


@pytest.mark.parametrize(
    "dtype", [torch.complex64, torch.complex128, torch.int64, torch.int32, torch.bool, torch.uint8]
)
@pytest.mark.parametrize("added", [False, True])
def test_complex_and_integer_parameters_are_refused_by_name(dtype: torch.dtype, added: bool) -> None:
    named = [("weight", make_params()[0]), ("embedding", torch.zeros(3, dtype=dtype))]
    optimizer = IVON([("bias", make_params()[1])], **HYPER)
    with pytest.raises(ValueError, match=f"parameter embedding has dtype {re.escape(str(dtype))}"):
        optimizer.add_param_group({"params": named}) if added else IVON(named, **HYPER)
    assert len(optimizer.param_groups) == 1


def test_duplicates_and_nothing_at_all_are_refused() -> None:
    """torch only warns of the first kind; where warnings are errors, as here, the error is ours all the same."""
    a, b = make_params([(3,), (2,)])
    with pytest.raises(ValueError, match="empty parameter list"):
        IVON([], **HYPER)
    with pytest.raises(ValueError, match="parameter 2 of the group appears twice"):
        IVON([a, b, a], **HYPER)
    with pytest.raises(ValueError, match="more than one parameter group"):
        IVON([{"params": [a]}, {"params": [a, b]}], **HYPER)
    optimizer = IVON([a], **HYPER)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [a]})
    assert len(optimizer.param_groups) == 1


def test_signature_is_that_of_ivon_opt() -> None:
    ivon = pytest.importorskip("ivon")
    theirs = list(inspect.signature(ivon.IVON.__init__).parameters.values())
    ours = list(inspect.signature(IVON.__init__).parameters.values())
    for a, b in zip(theirs, ours, strict=False):
        assert (a.name, a.default, a.kind) == (b.name, b.default, b.kind)
    assert all(p.kind == p.KEYWORD_ONLY for p in ours[len(theirs) :])


@pytest.mark.parametrize("kind", ["generator", "named", "groups", "named groups"])
def test_names_groups_and_generators_give_the_same_run(kind: str) -> None:
    params, others = make_params(), make_params()
    named = [(f"p{i}", p) for i, p in enumerate(params)]
    given: Any = {
        "generator": iter(params),
        "named": iter(named),
        "groups": [{"params": iter(params[:2])}, {"params": params[2:]}],
        "named groups": [{"params": named[:2]}, {"params": named[2:]}],
    }[kind]
    optimizer = IVON(given, **HYPER)
    run(optimizer, params, range(3))
    run(IVON(others, **HYPER), others, range(3))
    assert equal(params, others)
    names = [n for g in optimizer.param_groups for n in g.get("param_names", [])]
    assert names == ([n for n, _ in named] if "named" in kind else [])
