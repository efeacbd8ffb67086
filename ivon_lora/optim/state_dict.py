"""State dicts: what is saved, checks made before anything is changed, and the takeover of one of ivon-opt."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ivon_lora.functional.noise import NoiseKey
from ivon_lora.optim.param_groups import ADDED_ENTRIES, COUNTERS, check_group, state_dtype
from ivon_lora.optim.sharding import is_sharded, like, local, part_of

#: state of a parameter's shape, kept in the state's dtype whatever the parameter's
STATE_TENSORS = ("momentum", "hess", "mean", "sensitivity", "uncertainty")

#: values of "live_sample" in a saved group that are no index of a training sample
NO_SAMPLE, PREDICTION_SAMPLE = -1, -2

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
        missing = [name for name in ("ess", "hess_init", *COUNTERS) if name not in {**ADDED_ENTRIES, **saved}]
        if missing:
            raise ValueError(f"group {n} of the state dict lacks {', '.join(missing)}: it is not IVON's; {HINT}")
        check_group({**own, **ADDED_ENTRIES, **saved, "params": ()})
    own_params = [p for group in param_groups for p in group["params"]]
    for n, (p, entry) in enumerate(zip(own_params, entries(state_dict), strict=True)):
        if entry and not {"step", "momentum", "hess"} <= entry.keys():
            raise ValueError(
                f"the state of parameter {n} has {sorted(map(str, entry))}, not IVON's momentum and hess; {HINT}"
            )
        _check_decay(n, entry.get("weight_decay"))
        for name in ("momentum", "hess", "mean"):
            value = entry.get(name)
            if value is None:
                continue
            if not isinstance(value, Tensor) or value.shape != p.shape:
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{name} of parameter {n} is {shape}, the parameter {tuple(p.shape)}; {HINT}")
            if not bool(torch.isfinite(local(value)).all()):
                raise ValueError(
                    f"{name} of parameter {n} is not finite: the checkpoint is damaged; load an earlier one"
                )


def restore(
    state_dict: dict[str, Any], param_groups: list[dict[str, Any]], state: dict[Tensor, dict[str, Any]]
) -> tuple[int, dict[Tensor, Tensor]]:
    """Replace groups' hyperparameters and parameters' state by those of a checked state dict, and weights by means.

    torch's own loading would cast all but "step" to the parameter's dtype: hess to bf16, masks to floats.

    Returns:
        the entry "live_sample" of the groups, and the means that were saved while that sample was live.
    """
    live_sample = state_dict["param_groups"][0].get("live_sample", NO_SAMPLE)
    for group, saved in zip(param_groups, state_dict["param_groups"], strict=True):
        saved = {**ADDED_ENTRIES, **saved}
        group.update({name: value for name, value in saved.items() if name not in ("params", "live_sample")})
    state.clear()
    means: dict[Tensor, Tensor] = {}
    params = [p for group in param_groups for p in group["params"]]
    for p, entry in zip(params, entries(state_dict), strict=True):
        if not entry:
            continue
        own, dtype = state[p], state_dtype(p)
        for name, value in entry.items():
            of_shape = name in STATE_TENSORS
            if of_shape and is_sharded(p):
                value = local(value) if is_sharded(value) else part_of(p, value)
            device = "cpu" if name == "step" else p.device
            value = value.detach().to(device, dtype if of_shape else value.dtype, copy=True).contiguous()
            own[name] = like(p, value) if of_shape else value
        if p.dtype == dtype and "mean" in own:  # saved while a sample was live
            means[p] = local(own.pop("mean"))
            local(p).copy_(means[p])
        elif live_sample != NO_SAMPLE and "mean" in own:
            means[p] = local(own["mean"]).clone()
            local(p).copy_(means[p])
    return live_sample, means


def number_of(key: NoiseKey | None, antithetic: bool) -> int:
    """The entry "live_sample" of a group: which sample is live."""
    if key is None:
        return NO_SAMPLE
    if key.prediction:
        return PREDICTION_SAMPLE
    return 2 * key.sample + key.mirrored if antithetic else key.sample


def _check_decay(n: int, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"weight_decay of parameter {n} is {shape}, not a tensor of one element; {HINT}")
    if not 0 < float(value) < math.inf:
        raise ValueError(
            f"weight_decay of parameter {n} is {float(value)}, not a positive number: the checkpoint is damaged; load "
            "an earlier one"
        )


def is_ivon_opt(state_dict: dict[str, Any]) -> bool:
    """Whether this is a state dict of ivon-opt: its groups carry one flat momentum and one flat Hessian each."""
    groups = state_dict.get("param_groups") if isinstance(state_dict, dict) else None
    return bool(groups) and all({"momentum", "hess", "numel"} <= group.keys() for group in groups or ())


def from_ivon_opt(state_dict: dict[str, Any], param_groups: list[dict[str, Any]]) -> dict[str, Any]:
    """A state dict of ivon-opt 0.1.3 in the form of ours.

    Hyperparameters are taken over but for those that ivon-opt does not save (hess_approx, debias, rescale_lr). It does
    not save the number of steps either: a momentum that is not zero counts as past its bias correction.

    Args:
        state_dict: of ``ivon.IVON.state_dict()``; the parameters must have had the same order and groups.
        param_groups: the optimizer's.

    Raises:
        ValueError: groups or sizes differ.
    """
    saved_groups = state_dict["param_groups"]
    if len(saved_groups) != len(param_groups):
        raise ValueError(
            f"ivon-opt's state dict has {len(saved_groups)} groups, the optimizer {len(param_groups)}; {HINT}"
        )
    state: dict[int, dict[str, Any]] = {}
    groups = []
    for n, (saved, own) in enumerate(zip(saved_groups, param_groups, strict=True)):
        sizes = [p.numel() for p in own["params"]]
        if saved["momentum"].numel() != sum(sizes):
            raise ValueError(
                f"group {n} of ivon-opt's state dict has {saved['momentum'].numel()} elements, the optimizer's "
                f"{sum(sizes)}; {HINT}"
            )
        ids = list(range(len(state), len(state) + len(sizes)))
        settled = math.ceil(math.log(2**-24, saved["beta1"])) if 0 < saved["beta1"] < 1 else 1
        step = float(settled if bool(saved["momentum"].any()) else 0)
        parts = zip(saved["momentum"].split(sizes), saved["hess"].split(sizes), strict=True)
        for i, p, (momentum, hess) in zip(ids, own["params"], parts, strict=True):
            state[i] = {"step": torch.tensor(step), "momentum": momentum.view(p.shape), "hess": hess.view(p.shape)}
        known = {k: v for k, v in saved.items() if k not in ("momentum", "hess", "numel", "params")}
        groups.append({**own, **known, "params": ids})
    return {"state": state, "param_groups": groups}
