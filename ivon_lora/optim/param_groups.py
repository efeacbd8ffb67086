"""Hyperparameters of a group: their bounds, and the scalars of one step."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterable, Sequence
from numbers import Real
from operator import itemgetter
from typing import Any

import numpy as np
import torch

from ivon_lora.functional.ivon import Hyper

logger = logging.getLogger(__name__)

#: entries of every group that belong to the optimizer as a whole, and are saved with it
COUNTERS = ("seed", "completed_steps", "prediction_draws", "examples_seen")

HESS_APPROX = ("price", "gradsq", "fisher")
STEP_RULES = ("newton", "adam")
PRIORS = ("fixed", "empirical")
AUTO = "auto"

#: entries that state dicts of earlier versions lack, and what those versions did
ADDED_ENTRIES: dict[str, Any] = {
    **{"batch_size": None, "step_rule": "newton", "antithetic": False, "maximize": False, "prior": "fixed"},
    **{"noise_warmup": 0, "examples_seen": 0},
}

#: Updates whose curvatures are averaged into the initial Hessian, without noise, for ``hess_init="auto"``. The mean of
#: n squared normals underestimates: 1 / mean has expectation n / (n - 2), so after 10 the variance of the posterior is
#: on average 25 % too large at most, and less with every update that follows.
WARM_UP = 10

#: rho lambda / B of ``beta2="auto"`` for Price's curvature, which is biased by half of that: 5 %
PRICE_RATE = 0.1

# name: (lower bound, lower bound allowed, upper bound, upper bound allowed)
_BOUNDS: dict[str, tuple[float, bool, float, bool]] = {
    "lr": (0.0, True, math.inf, False),
    "ess": (0.0, False, math.inf, False),
    "hess_init": (0.0, False, math.inf, False),
    "beta1": (0.0, True, 1.0, False),
    "beta2": (0.0, True, 1.0, True),
    "weight_decay": (0.0, True, math.inf, False),
    "clip_radius": (0.0, False, math.inf, True),
}


def check_group(group: dict[str, Any]) -> None:
    """Check the hyperparameters of a group, and the dtypes of its parameters if it has any.

    Raises:
        ValueError: naming the argument, its value and its bounds.
    """
    for name, (low, low_allowed, high, high_allowed) in _BOUNDS.items():
        if name in ("hess_init", "beta2") and isinstance(group[name], str) and group[name] == AUTO:
            continue
        value = _number(name, group[name])
        above = value >= low if low_allowed else value > low
        below = value <= high if high_allowed else value < high
        if not (above and below):  # a NaN fails both
            interval = f"{'[' if low_allowed else '('}{low:g}, {high:g}{']' if high_allowed else ')'}"
            raise ValueError(f"{name} must lie in {interval}, got {value!r}")
    if not isinstance(group["mc_samples"], int) or isinstance(group["mc_samples"], bool) or group["mc_samples"] < 1:
        raise ValueError(f"mc_samples must be an integer of at least 1, got {group['mc_samples']!r}")
    if group["hess_approx"] not in HESS_APPROX:
        raise ValueError(
            f"hess_approx must be one of {', '.join(map(repr, HESS_APPROX))}, got {group['hess_approx']!r}"
        )
    if group["step_rule"] not in STEP_RULES:
        raise ValueError(f"step_rule must be one of {', '.join(map(repr, STEP_RULES))}, got {group['step_rule']!r}")
    if group["prior"] not in PRIORS:
        raise ValueError(f"prior must be one of {', '.join(map(repr, PRIORS))}, got {group['prior']!r}")
    size = group["batch_size"]
    if size not in (None, AUTO) and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise ValueError(
            f"batch_size must be the number of examples per step, an integer of at least 1, or 'auto', got {size!r}"
        )
    if not isinstance(group["maximize"], bool):
        raise ValueError(f"maximize must be True or False, got {group['maximize']!r}")
    examples = group["noise_warmup"]
    if not isinstance(examples, int) or isinstance(examples, bool) or examples < 0:
        raise ValueError(f"noise_warmup must be a number of examples, an integer of at least 0, got {examples!r}")
    if group["antithetic"] and group["mc_samples"] % 2:
        raise ValueError(
            f"antithetic=True pairs the samples of a step: mc_samples must be even, got {group['mc_samples']}"
        )
    _check_combination(group)
    for i, p in enumerate(group.get("params", ())):
        name = group["param_names"][i] if "param_names" in group else f"number {i} of its group"
        if not p.is_floating_point():
            raise ValueError(f"parameter {name} has dtype {p.dtype}; IVON takes real floating-point parameters only")


#: entries that `check_group` reads, but the parameters
_CHECKED = (*_BOUNDS, "mc_samples", "hess_approx", "step_rule", "prior", "batch_size", "maximize", "noise_warmup")
_CHECKED += ("antithetic",)


def check_again(group: dict[str, Any]) -> None:
    """The same for the hyperparameters only, and only if they are others than lately: most are those of last step.

    Raises:
        ValueError: see `check_group`.
    """
    values = _checked(group)
    if not _IMMUTABLE.issuperset(map(type, values)):
        check_group({**group, "params": ()})
    else:
        _check_values(*values)


_checked = itemgetter(*_CHECKED)
_IMMUTABLE = {int, float, str, bool, type(None)}


@functools.lru_cache(maxsize=64, typed=True)
def _check_values(*values: Any) -> None:
    check_group(dict(zip(_CHECKED, values, strict=True)))


def _check_combination(group: dict[str, Any]) -> None:
    """Options that need others.

    Raises:
        ValueError: naming both.
    """
    fisher, automatic = group["hess_approx"] == "fisher", group["hess_init"] == AUTO
    needs_batch = [
        f"{name}={group[name]!r}"
        for name, needed in (
            ("hess_approx", fisher),
            ("hess_init", automatic and group["hess_approx"] == "price"),
            ("beta2", group["beta2"] == AUTO and group["hess_approx"] == "price"),
        )
        if needed
    ]
    if needs_batch and group["batch_size"] is None:
        raise ValueError(
            f"{needs_batch[0]} needs batch_size: the number of examples averaged into one step's gradient, over all "
            "accumulated micro-batches and all replicas; or batch_size='auto' and optimizer.attach(model), which counts"
        )
    if (fisher or automatic) and group["weight_decay"] == 0:
        name = "hess_approx" if fisher else "hess_init"
        raise ValueError(
            f"{name}={group[name]!r} needs weight_decay > 0: where the gradient is zero, the prior alone bounds sigma "
            "(prior_std sets it: weight_decay = 1 / (ess prior_std^2))"
        )
    if group["noise_warmup"] and not fisher:
        raise ValueError(
            f"noise_warmup={group['noise_warmup']} needs hess_approx='fisher', got {group['hess_approx']!r}: other "
            "curvatures are estimated from the noise"
        )
    if group["prior"] == "empirical":
        if group["hess_approx"] == "price":
            raise ValueError(
                "prior='empirical' needs hess_approx='fisher' or 'gradsq', got 'price': the Hessian of Price's "
                "estimator may be negative, and the posterior wider than the prior that is to be found from it"
            )
        if group["weight_decay"] == 0:
            raise ValueError(
                "prior='empirical' needs weight_decay > 0 (or prior_std): the widest prior, from which the data narrow "
                "it"
            )
    if group["step_rule"] == "adam" and not fisher:
        raise ValueError(
            f"step_rule='adam' needs hess_approx='fisher', got {group['hess_approx']!r}: it divides by the root of a "
            "squared gradient's mean"
        )


def needs_batch_size(group: dict[str, Any]) -> bool:
    """Whether the number of examples in a step matters to the group."""
    return group["hess_approx"] == "fisher" or (
        group["hess_approx"] == "price" and AUTO in (group["hess_init"], group["beta2"])
    )


def resolve_ess(ess: float | str, num_examples: int | None, temperature: float) -> float:
    """lambda: as given, or for "auto" the number of training examples divided by the temperature.

    Raises:
        ValueError: "auto" without ``num_examples``, an argument outside its bounds, or one that nothing reads.
    """
    if not 0 < _number("temperature", temperature) < math.inf:
        raise ValueError(f"temperature must lie in (0, inf), got {temperature!r}")
    if isinstance(ess, str):
        if ess != AUTO:
            raise ValueError(f"ess must be a number or 'auto', got {ess!r}")
        if num_examples is None:
            raise ValueError(
                "ess='auto' needs num_examples, the number of training examples: len(train_dataset) for a list"
            )
        if not isinstance(num_examples, int) or isinstance(num_examples, bool) or num_examples < 1:
            raise ValueError(f"num_examples must be an integer of at least 1, got {num_examples!r}")
        return num_examples / float(temperature)
    for name, given in (("num_examples", num_examples is not None), ("temperature", temperature != 1.0)):
        if given:
            raise ValueError(f"{name} is read for ess='auto' only, and ess is {ess!r}; drop one of the two")
    return ess


def weight_decay_of(prior_std: float, ess: float) -> float:
    """delta = 1 / (lambda prior_std^2): the prior's standard deviation is that of the posterior where h = 0.

    Raises:
        ValueError: ``prior_std`` is outside its bounds.
    """
    if not 0 < _number("prior_std", prior_std) < math.inf:
        raise ValueError(f"prior_std must lie in (0, inf), got {prior_std!r}")
    return 1.0 / (float(ess) * float(prior_std) ** 2)


#: of `IVON.from_adamw`, chosen on LoRA adapters: temperature, the prior's weight, the largest noise whatever the data,
#: and the learning rate they were chosen at
ADAPTER_TEMPERATURE, ADAPTER_WEIGHT_DECAY, ADAPTER_STD, ADAPTER_LR = 3e-3, 1e-3, 0.1, 3e-3


def adapter_temperature(lr: float) -> float:
    """Temperature of `IVON.from_adamw`: below `ADAPTER_LR` in proportion to the square of the learning rate.

    So the noise is proportional to it. Adam moves a weight by about the learning rate in a step, and noise that is many
    times larger drowns what the steps can learn. Learning rates of whole models are a hundredth of those of adapters,
    and their noise has to be.
    """
    share = min(1.0, lr / ADAPTER_LR) if lr > 0 else 1.0
    return ADAPTER_TEMPERATURE * share**2


def adapter_weight_decay(num_examples: int, temperature: float) -> float:
    """delta of `IVON.from_adamw`: a constant, but for data so few that the noise would exceed `ADAPTER_STD`."""
    return max(ADAPTER_WEIGHT_DECAY, weight_decay_of(ADAPTER_STD, resolve_ess(AUTO, num_examples, temperature)))


def with_own_temperatures(params: list[Any], num_examples: int) -> list[Any]:
    """Groups with a learning rate of their own get the noise that belongs to it."""
    return [
        {"ess": resolve_ess(AUTO, num_examples, adapter_temperature(float(item["lr"]))), **item}
        if isinstance(item, dict) and "lr" in item
        else item
        for item in params
    ]


def check_total_steps(total_steps: Any) -> None:
    """Check a number of steps that a user stated, or None.

    Raises:
        ValueError: it is not an integer of at least 1.
    """
    if total_steps is None:
        return
    if not isinstance(total_steps, int) or isinstance(total_steps, bool) or total_steps < 1:
        raise ValueError(
            f"total_steps must be the number of steps of the run, at least 1, or None, got {total_steps!r}"
        )


def beta2_notice(groups: Sequence[dict[str, Any]], total_steps: int) -> str | None:
    """What to say of a Hessian that will not leave its initial value within a run of ``total_steps``, if that is so."""
    for group in groups:
        stays = 0.0 if group["beta2"] == AUTO else float(group["beta2"]) ** total_steps
        if stays > 0.5 and group["hess_init"] != AUTO:
            return (
                f"beta2={group['beta2']:g}: after {total_steps} steps the initial Hessian still has a weight of "
                f"{stays:.0%}, so the posterior's variance hardly depends on the data; beta2='auto' adapts to the run"
            )
    return None


#: entries of AdamW's groups that have no counterpart here
ADAMW_ENTRIES = (
    *("eps", "weight_decay", "amsgrad", "foreach", "capturable", "differentiable", "fused"),
    *("decoupled_weight_decay", "initial_lr"),
)


def without_adamw_entries(params: Iterable[Any]) -> list[Any]:
    """Parameters or groups as given, the groups with AdamW's ``betas`` by our names; what is dropped is logged.

    A group that states the width of its prior keeps it, unless it says otherwise.
    """
    kept, dropped = [], set()
    for item in [params] if isinstance(params, torch.Tensor) else params:
        if isinstance(item, dict):
            dropped |= item.keys() & set(ADAMW_ENTRIES)
            item = {name: value for name, value in item.items() if name not in ADAMW_ENTRIES}
            if "betas" in item:
                item["beta1"], item["beta2"] = item.pop("betas")
            if "prior_std" in item:
                item.setdefault("prior", "fixed")
        kept.append(item)
    if dropped:
        logger.info("from_adamw dropped %s of the groups; the prior takes weight decay's place", sorted(dropped))
    return kept


def initial_hess(group: dict[str, Any]) -> float:
    """h before the first update; the prior alone for "auto"."""
    return 0.0 if group["hess_init"] == AUTO else float(group["hess_init"])


def horizon_free_rho(update: int) -> float:
    """rho of ``beta2="auto"``: a running mean for 10 updates, a memory of 10 until the 100th, then of the last tenth.

    The memory grows with the run, so the number of steps need not be known: ``max(1/t, 1 / max(10, t / 10))``.
    """
    return max(1.0 / update, 1.0 / max(10.0, update / 10.0))


def is_warming_up(group: dict[str, Any], update: int) -> bool:
    """Whether the ``update``-th update (from 1) is one of those that ``hess_init="auto"`` finds the Hessian with."""
    return group["hess_init"] == AUTO and update <= WARM_UP


def rho_of(group: dict[str, Any], update: int, batch_size: int) -> float:
    """Weight of the ``update``-th curvature estimate (from 1).

    With ``hess_init="auto"`` and a ``beta2``, ``(1 - beta2) / (1 - beta2^t)``: the exponential mean without the bias of
    its start, which is Adam's (arXiv 1412.6980, section 3), in one line.
    """
    price = group["hess_approx"] == "price"
    if is_warming_up(group, update) and (price or group["beta2"] == AUTO):
        return 1.0 / update
    if group["beta2"] == AUTO:
        rho = horizon_free_rho(update)
        return min(rho, PRICE_RATE * batch_size / float(group["ess"])) if price else rho
    beta2 = float(group["beta2"])
    return (1.0 - beta2) / (1.0 - beta2**update) if group["hess_init"] == AUTO and not price else 1.0 - beta2


def kl_weight(group: dict[str, Any]) -> float:
    """Weight of the variational objective's KL term in the coming step: 1, or with ``noise_warmup`` on its way there.

    It grows with the square of the examples seen, so the standard deviation of the noise grows in proportion to them.
    This is the annealing of arXiv 1511.06349, section 3.1. Examples that are seen for the first time cannot be
    overfitted: there a weight of 1 would cost accuracy and buy nothing.
    """
    seen, whole = group["examples_seen"], group["noise_warmup"]
    return 1.0 if seen >= whole else float((seen / whole) ** 2)


def noise_ess_of(group: dict[str, Any], update: int) -> float:
    """lambda of the training sample before the ``update``-th update (from 1); infinite where there is no noise.

    The posterior of a loss whose KL term has a weight w has lambda / w.
    """
    weight = 0.0 if is_warming_up(group, update) else kl_weight(group)
    return float(group["ess"]) / weight if weight else math.inf


def _number(name: str, value: Any) -> float:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return float(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name} must be a number, got {value!r}")
    return float(value)


def plain_numbers(group: dict[str, Any]) -> None:
    """Turn numpy scalars into Python numbers, in place: ``torch.load(weights_only=True)`` refuses numpy's."""
    for name, value in group.items():
        if isinstance(value, np.generic):
            group[name] = value.item()


def hyper_of(
    group: dict[str, Any], update: int, examples: int | None = None, prediction: bool = False, parts: int = 1
) -> Hyper:
    """The scalars of a parameter's ``update``-th update (from 1), derived in double precision.

    Args:
        examples: counted in this step, for ``batch_size="auto"``; None where no curvature will be computed.
        prediction: for a draw that is not for training: it has noise even while the Hessian is being found.
        parts: equal parts of the batch whose gradients have curvatures of their own.

    Raises:
        ValueError: a hyperparameter left its bounds since the group was added.
    """
    check_again(group)
    lr, beta1, weight_decay = float(group["lr"]), float(group["beta1"]), float(group["weight_decay"])
    ess, estimate = float(group["ess"]), group["hess_approx"]
    batch_size = group["batch_size"] if isinstance(group["batch_size"], int) else examples or 1
    plain_mean = (
        estimate == "fisher" or is_warming_up(group, update) or (estimate == "gradsq" and group["beta2"] == AUTO)
    )
    rescaled = group["rescale_lr"] and group["step_rule"] == "newton" and group["hess_init"] != AUTO
    if rescaled:
        lr *= float(group["hess_init"]) + weight_decay
    return Hyper(
        ess=ess,
        weight_decay=weight_decay,
        lr=lr,
        beta1=beta1,
        beta1_complement=beta1 - 1.0 if group["maximize"] else 1.0 - beta1,
        rho=rho_of(group, update, batch_size),
        clip_radius=float(group["clip_radius"]),
        debias=1.0 - beta1**update if group["debias"] else 1.0,
        square_scale=ess if estimate == "gradsq" else batch_size / parts,
        inverse_batch=1.0 / batch_size,
        noise_ess=ess if prediction else noise_ess_of(group, update),
        curvature="fisher" if plain_mean else estimate,
        step_rule=group["step_rule"],
        prior_weight=kl_weight(group),
    )


def state_dtype(p: torch.Tensor) -> torch.dtype:
    """dtype of a parameter's state: fp64 for fp64, fp32 for all others (in bf16, ``0.99999 h`` rounds back to h)."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32
