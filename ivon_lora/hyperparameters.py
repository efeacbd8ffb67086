"""Hyperparameters of a group: their bounds, and the scalars of one step."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import numpy as np
import torch

from ivon_lora.reference import Hyper

#: entries of every group that belong to the optimizer as a whole, and are saved with it
COUNTERS = ("seed", "completed_steps", "prediction_draws")

HESS_APPROX = ("price", "gradsq")

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
    for i, p in enumerate(group.get("params", ())):
        name = group["param_names"][i] if "param_names" in group else f"number {i} of its group"
        if not p.is_floating_point():
            raise ValueError(f"parameter {name} has dtype {p.dtype}; IVON takes real floating-point parameters only")


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


def hyper_of(group: dict[str, Any], update: int) -> Hyper:
    """The scalars of a parameter's ``update``-th update (from 1), derived in double precision.

    Raises:
        ValueError: a hyperparameter left its bounds since the group was added.
    """
    check_group({**group, "params": ()})
    lr, beta1, weight_decay = float(group["lr"]), float(group["beta1"]), float(group["weight_decay"])
    return Hyper(
        ess=float(group["ess"]),
        weight_decay=weight_decay,
        lr=lr * (float(group["hess_init"]) + weight_decay) if group["rescale_lr"] else lr,
        beta1=beta1,
        beta1_complement=1.0 - beta1,
        rho=1.0 - float(group["beta2"]),
        clip_radius=float(group["clip_radius"]),
        debias=1.0 - beta1**update if group["debias"] else 1.0,
        gradsq=group["hess_approx"] == "gradsq",
    )


def state_dtype(p: torch.Tensor) -> torch.dtype:
    """dtype of a parameter's state: fp64 for fp64, fp32 for all others (in bf16, ``0.99999 h`` rounds back to h)."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32
