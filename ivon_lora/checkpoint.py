"""Checks of an optimizer state dict, made before anything is changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ivon_lora.hyperparameters import COUNTERS, check_group

HINT = "load the state dict that IVON.state_dict() of the same model and groups returned"


def entries(state_dict: dict[str, Any]) -> list[dict[str, Any]]:
    """The saved state of every parameter, in the order of the groups; empty where a parameter had none."""
    ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    return [state_dict["state"].get(i, {}) for i in ids]


def check_state_dict(state_dict: dict[str, Any], param_groups: list[dict[str, Any]]) -> None:
    """Check that a state dict fits the optimizer's groups.

    Raises:
        ValueError: it is not one of IVON's, or groups, parameters or shapes differ.
    """
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(f"not an optimizer state dict; {HINT}")
    saved_groups = state_dict["param_groups"]
    if len(saved_groups) != len(param_groups):
        raise ValueError(
            f"the state dict has {len(saved_groups)} parameter groups, the optimizer {len(param_groups)}; {HINT}"
        )
    for n, (saved, own) in enumerate(zip(saved_groups, param_groups, strict=True)):
        if len(saved["params"]) != len(own["params"]):
            raise ValueError(
                f"group {n} of the state dict has {len(saved['params'])} parameters, "
                f"the optimizer's {len(own['params'])}; {HINT}"
            )
        missing = [name for name in ("ess", "hess_init", *COUNTERS) if name not in saved]
        if missing:
            raise ValueError(f"group {n} of the state dict lacks {', '.join(missing)}: it is not IVON's; {HINT}")
        check_group({**own, **saved, "params": ()})
    own_params = [p for group in param_groups for p in group["params"]]
    for n, (p, entry) in enumerate(zip(own_params, entries(state_dict), strict=True)):
        if entry and not {"step", "momentum", "hess"} <= entry.keys():
            raise ValueError(
                f"the state of parameter {n} has {sorted(map(str, entry))}, not IVON's momentum and hess; {HINT}"
            )
        for name in ("momentum", "hess", "mean"):
            value = entry.get(name)
            if value is None:
                continue
            if not isinstance(value, Tensor) or value.shape != p.shape:
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{name} of parameter {n} is {shape}, the parameter {tuple(p.shape)}; {HINT}")
            if not bool(torch.isfinite(value).all()):
                raise ValueError(
                    f"{name} of parameter {n} is not finite: the checkpoint is damaged; load an earlier one"
                )
