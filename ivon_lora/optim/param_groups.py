"""Parameter groups: their entries, the bounds of these, and the scalars of one step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ivon_lora.functional.ivon import Hyper
from ivon_lora.optim.sharding import check_layout, is_sharded

if TYPE_CHECKING:
    from ivon_lora.optim.example_counter import Counts

Group = dict[str, Any]

#: entries of every group that belong to the optimizer as a whole, and are saved with it: as they begin
COUNTERS: Group = {"seed": 0, "completed_steps": 0, "prediction_draws": 0, "first_index": 0}
COUNTERS |= {"examples_seen": 0, "labels_per_example": 1.0}
#: other entries, where neither the optimizer nor its user says more; version 0.1.0 did not have those of the first line
DEFAULTS: Group = {"algorithm": "ivon", "maximize": False, "batch_size": None, "noise_warmup": 0, "lr_limit": math.inf}
DEFAULTS |= {"hess_init": 1.0, "clip_radius": math.inf, "mc_samples": 1, "sync": False, "debias": True}

#: values of the entry "hess_approx"; VAdam's curvature is "fisher" whatever it says
HESS_APPROX = ("price", "gradsq")

#: The first updates of `VAdam`, which are made at the mean, without noise: their curvatures make the initial Hessian.
#: The mean of n squared normals underestimates: 1 / mean has expectation n / (n - 2), so after 10 the variance of the
#: posterior is on average 25 % too large at most, and less with every update that follows.
WARM_UP = 10

# name: (lower bound, lower bound allowed, upper bound, upper bound allowed)
_BOUNDS: dict[str, tuple[float, bool, float, bool]] = {
    "lr": (0.0, True, math.inf, False),
    "ess": (0.0, False, math.inf, False),
    "hess_init": (0.0, False, math.inf, False),
    "beta1": (0.0, True, 1.0, False),
    "beta2": (0.0, True, 1.0, True),
    "weight_decay": (0.0, True, math.inf, False),
    "clip_radius": (0.0, False, math.inf, True),
    "prior_std": (0.0, False, math.inf, False),
    "temperature": (0.0, False, math.inf, False),
    "lr_limit": (0.0, False, math.inf, True),
}


def number(name: str, value: Any) -> float:
    """A number as float. ValueError outside its bounds, which names the argument, its value and the bounds."""
    if type(value) is not float:
        value = _plain(value)
        if isinstance(value, bool) or not isinstance(value, Real):
            raise ValueError(f"{name} must be a number, got {value!r}")
    low, low_allowed, high, high_allowed = _BOUNDS[name]
    found = float(value)
    above = found >= low if low_allowed else found > low
    below = found <= high if high_allowed else found < high
    if not (above and below):  # a NaN fails both
        interval = f"{'[' if low_allowed else '('}{low:g}, {high:g}{']' if high_allowed else ')'}"
        raise ValueError(f"{name} must lie in {interval}, got {value!r}")
    return found


def integer(name: str, value: Any, low: int = 1, meaning: str = "") -> int:
    """An integer, of Python, numpy or torch (``mask.sum()``). ValueError below ``low``, as `number` says it."""
    if type(value) is not int:
        value = _plain(value)
    if isinstance(value, bool) or not isinstance(value, Integral) or value < low:
        raise ValueError(
            f"{name} must be {meaning + ', ' if meaning else ''}an integer of at least {low}, got {value!r}"
        )
    return int(value)


def check_group(group: Group) -> None:
    """ValueError if a hyperparameter of a group is outside its bounds, as `number` says it."""
    for name in ("lr", "ess", "hess_init", "beta1", "beta2", "weight_decay", "clip_radius"):
        number(name, group[name])
    integer("mc_samples", group["mc_samples"])
    if group["hess_approx"] not in HESS_APPROX:
        raise ValueError(f"hess_approx must be 'price' or 'gradsq', got {group['hess_approx']!r}")
    if not isinstance(group["maximize"], bool | np.bool_):
        raise ValueError(f"maximize must be True or False, got {group['maximize']!r}")
    if group["batch_size"] not in (None, "auto"):
        integer("batch_size", group["batch_size"], meaning="'auto' or the number of examples per step")
    integer("noise_warmup", group["noise_warmup"], low=0, meaning="a number of examples")
    if group["algorithm"] == "vadam" and group["weight_decay"] == 0:
        raise ValueError("VAdam needs weight_decay > 0: where the gradient is zero, the prior alone bounds sigma")


def check_params(group: Group) -> None:
    """ValueError, naming the parameter, for a dtype or a spread over processes that the optimizer does not take."""
    for i, p in enumerate(group["params"]):
        name = group["param_names"][i] if "param_names" in group else f"number {i} of its group"
        is_frozen = isinstance(p, torch.nn.Parameter) and not p.requires_grad  # as packed weights of a quantised base
        if not p.is_floating_point() and not is_frozen:
            raise ValueError(f"parameter {name} has dtype {p.dtype}; IVON takes real floating-point parameters only")
        check_layout(name, p)
        if group["sync"] and is_sharded(p):
            raise ValueError(f"sync=True needs whole parameters, and {name} is sharded; take sync=False")


def listed(params: torch.Tensor | Iterable[Any]) -> list[Any]:
    """The parameters of a group, with their names if they have some. ValueError if one is there twice."""
    given = [params] if isinstance(params, torch.Tensor) else list(params)
    tensors = without_names(given)
    if len({id(p) for p in tensors}) < len(tensors):
        twice = next(n for n, p in enumerate(tensors) if any(p is q for q in tensors[:n]))
        raise ValueError(f"parameter {twice} of the group appears twice in it; pass every parameter once")
    return given


def without_names(params: Iterable[Any]) -> list[Any]:
    """The parameters alone."""
    return [p[1] if isinstance(p, tuple) else p for p in params]


def plain_numbers(group: Group) -> None:
    """Turn what numpy calls a number into Python's, in place: ``torch.load(weights_only=True)`` refuses numpy's.

    So with tensors of integers; those of floats are torch's way to change a hyperparameter in place.
    """
    for name, value in group.items():
        if not (isinstance(value, torch.Tensor) and value.is_floating_point()):
            group[name] = _plain(value)


def _plain(value: Any) -> Any:
    """The number in a tensor or array of one element; anything else as it is."""
    alone = isinstance(value, torch.Tensor | np.generic | np.ndarray) and math.prod(value.shape) == 1
    return value.item() if alone else value


def weight_decay_of(prior_std: Any, ess: Any) -> float:
    """delta = 1 / (lambda prior_std^2): the prior's standard deviation is that of the posterior where h = 0."""
    return 1.0 / (number("ess", ess) * number("prior_std", prior_std) ** 2)


def initial_hess(group: Group) -> float:
    """h before the first update; for VAdam the posterior is the prior until there is a curvature."""
    return 0.0 if group["algorithm"] == "vadam" else float(group["hess_init"])


def kl_weight(group: Group) -> float:
    """Weight of the variational objective's KL term in the coming step: 1, or with ``noise_warmup`` on its way there.

    It grows with the square of the examples seen, so the standard deviation of the noise grows in proportion to them.
    This is the annealing of arXiv 1511.06349, section 3.1. Examples that are seen for the first time cannot be
    overfitted: there a weight of 1 would cost accuracy and buy nothing.
    """
    seen, whole = group["examples_seen"], group["noise_warmup"]
    return 1.0 if seen >= whole else float((seen / whole) ** 2)


def count_step(group: Group, counted: Counts | None) -> tuple[int, float]:
    """Examples of a step, and labels per example in all steps up to and with it, the running mean.

    Args:
        counted: in the step's forwards; None where nothing was.
    """
    stated, before = group["batch_size"], group["labels_per_example"]
    examples = stated if isinstance(stated, int) else counted.examples if counted else 0
    if counted is None:
        return examples, before
    change = counted.labels / counted.examples - before
    return examples, before + change * (examples / (group["examples_seen"] + examples))


def hyper_of(group: Group, update: int, counted: Counts | None = None, prediction: bool = False) -> Hyper:
    """The scalars of a parameter's ``update``-th update (from 1), or of the draw before it, in double precision.

    The loss of an example is the sum over its labels. A mean over labels has a gradient that is as many times smaller
    as an example has labels, so that it is multiplied by their number; and a step's labels are as many examples as
    their number divided by it.

    Args:
        group: as `check_group` wants it.
        counted: in this step's forwards; None where nothing was, or no curvature is computed.
        prediction: of the posterior as it stands, not of training's noise and scores.
    """
    lr, beta1, beta2 = float(group["lr"]), float(group["beta1"]), float(group["beta2"])
    ess, weight_decay = float(group["ess"]), float(group["weight_decay"])
    common: dict[str, Any] = {
        "ess": ess,
        "weight_decay": weight_decay,
        "beta1": beta1,
        "clip_radius": float(group["clip_radius"]),
        "debias": 1.0 - beta1**update if group["debias"] else 1.0,
        "curvature": "fisher" if group["algorithm"] == "vadam" else group["hess_approx"],
        "noise_ess": ess,
        "grad_scale": -1.0 if group["maximize"] else 1.0,
    }
    if group["algorithm"] == "ivon":
        if group["rescale_lr"]:
            lr *= float(group["hess_init"]) + weight_decay
        return Hyper(**common, lr=lr, rho=1.0 - beta2, square_scale=ess)
    examples, labels_per_example = count_step(group, counted)
    batch_size: float = examples or 1
    if counted is not None and not isinstance(group["batch_size"], int):
        batch_size = counted.labels / labels_per_example
    common["grad_scale"] *= labels_per_example
    weight = kl_weight(group)
    if not prediction:
        warming_up = update <= WARM_UP
        common["noise_ess"] = ess / weight if weight and not warming_up else math.inf
    elif weight:  # the posterior of the objective as it stands; before any example is seen it is the prior
        common["ess"] = common["noise_ess"] = ess / weight
    return Hyper(
        **common,
        lr=min(lr, group["lr_limit"]),
        # the exponential mean without the bias of its start, which is Adam's (arXiv 1412.6980, section 3), in one line
        rho=(1.0 - beta2) / (1.0 - beta2**update) if beta2 < 1.0 else 1.0 / update,
        square_scale=batch_size,
        inverse_batch=1.0 / batch_size,
        prior_weight=weight,
    )


def state_dtype(p: torch.Tensor) -> torch.dtype:
    """dtype of a parameter's state: fp64 for fp64, fp32 for all others (in bf16, ``0.99999 h`` rounds back to h)."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32
