"""State dicts: what is saved, checks made before anything is changed, and the takeover of one of ivon-opt."""

from __future__ import annotations

import math
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ivon_lora.functional.noise import NoiseKey
from ivon_lora.optim.guards import no_autograd
from ivon_lora.optim.param_groups import COUNTERS, DEFAULTS, Group, check_group, state_dtype
from ivon_lora.optim.sharding import is_sharded, like, local, part_of

if TYPE_CHECKING:
    from ivon_lora.optim.ivon import IVON
    from ivon_lora.optim.sampling import Sampling

#: state of a parameter's shape, kept in the state's dtype whatever the parameter's
STATE_TENSORS = ("momentum", "hess", "mean", "sensitivity", "uncertainty")

#: values of "live_sample" in a saved group that are no index of a training sample
NO_SAMPLE, PREDICTION_SAMPLE = -1, -2

#: entries of groups of version 0.1.0 that are gone
GONE = ("antithetic", "step_rule", "prior", "empirical_prior")

OWN_PRIORS = (
    "the state dict holds a prior for every tensor (of version 0.1.0, where the data chose them), which is gone: the "
    "prior of the group takes their place; prior_std states another"
)

HINT = "load the state dict that the same optimizer, with the same model and groups, returned"


def save(state_dict: dict[str, Any], sampling: Sampling) -> dict[str, Any]:
    """Complete what torch collects: which sample is live, and steps that do not change with the optimizer's."""
    state_dict["state"] = {
        index: {name: x.clone() if name == "step" else x for name, x in entry.items()}
        for index, entry in state_dict["state"].items()
    }
    key = sampling.key
    sample = NO_SAMPLE if key is None else PREDICTION_SAMPLE if key.prediction else key.sample
    for group in state_dict["param_groups"]:
        group["live_sample"] = sample
    return state_dict


@no_autograd
def load(optimizer: IVON, state_dict: dict[str, Any]) -> None:
    """Replace hyperparameters and state, and weights by means. Raises what `IVON.load_state_dict` says."""
    groups, sampling = optimizer.param_groups, optimizer.sampling
    _check_form(state_dict, groups)
    if is_ivon_opt(state_dict):
        state_dict = from_ivon_opt(state_dict, groups)
    _check_params(state_dict, groups)
    pairs = enumerate(zip(state_dict["param_groups"], groups, strict=True))
    saved_groups = [_checked_group(n, saved, own) for n, (saved, own) in pairs]
    params = [p for group in groups for p in group["params"]]
    ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    entries = [state_dict["state"].get(i, {}) for i in ids]  # empty where a parameter had no state
    for n, (p, entry) in enumerate(zip(params, entries, strict=True)):
        _check_entry(n, p, entry)

    if any("weight_decay" in entry for entry in entries):
        optimizer.warn_once("own priors", OWN_PRIORS)
    sampling.restore()
    sampling.forget_step()
    for group, saved in zip(groups, saved_groups, strict=True):
        group.update({name: value for name, value in saved.items() if name not in ("params", "live_sample")})
    optimizer.state.clear()
    sample = state_dict["param_groups"][0].get("live_sample", NO_SAMPLE)
    means = []
    for p, entry in zip(params, entries, strict=True):
        mean = _restore(optimizer.state[p], p, entry, sample != NO_SAMPLE) if entry else None
        if mean is not None:
            means.append((p, mean))
    if means and sample != NO_SAMPLE:
        first = groups[0]
        prediction = sample == PREDICTION_SAMPLE
        step = first["prediction_draws"] - 1 if prediction else first["completed_steps"]
        sampling.loaded = NoiseKey(first["seed"], step, 0 if prediction else sample, prediction), means


def _restore(own: dict[str, Any], p: Tensor, entry: dict[str, Any], sampled: bool) -> Tensor | None:
    """Fill the state of one parameter; returns the mean if the parameter held a sample when it was saved.

    torch's own loading would cast all but "step" to the parameter's dtype: hess to bf16, masks to floats.
    """
    dtype = state_dtype(p)
    for name, value in entry.items():
        of_shape = name in STATE_TENSORS
        if name == "weight_decay":  # see OWN_PRIORS
            continue
        if name == "step":  # other optimizers, and users' hooks, make it a number
            own[name] = torch.tensor(float(value), dtype=torch.float32, device="cpu")
            continue
        if not isinstance(value, Tensor):
            own[name] = value
            continue
        if of_shape and is_sharded(p):
            value = local(value) if is_sharded(value) else part_of(p, value)
        new = value.detach().to(p.device, dtype if of_shape else value.dtype, copy=True).contiguous()
        own[name] = like(p, new) if of_shape else new
    if "mean" not in own or (p.dtype != dtype and not sampled):
        return None
    mean = local(own["mean"]).clone()
    if p.dtype == dtype:
        del own["mean"]
    local(p).copy_(mean)
    return mean


# ---------------------------------------------------------------- checks, before anything is changed


def _check_form(state_dict: Any, groups: list[Group]) -> None:
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(f"not an optimizer state dict; {HINT}")
    saved_groups = state_dict["param_groups"]
    if len(saved_groups) != len(groups):
        raise ValueError(
            f"the state dict has {len(saved_groups)} parameter groups, the optimizer {len(groups)}; {HINT}"
        )


def _check_params(state_dict: dict[str, Any], groups: list[Group]) -> None:
    saved_groups = state_dict["param_groups"]
    for n, (saved, own) in enumerate(zip(saved_groups, groups, strict=True)):
        if len(saved["params"]) != len(own["params"]):
            raise ValueError(
                f"group {n} of the state dict has {len(saved['params'])} parameters, "
                f"the optimizer's {len(own['params'])}; {HINT}"
            )
        missing = [name for name in ("ess", "hess_init", "seed", "completed_steps") if name not in saved]
        if missing:
            raise ValueError(f"group {n} of the state dict lacks {', '.join(missing)}: it is not IVON's; {HINT}")
    ids = {i for saved in saved_groups for i in saved["params"]}
    if strangers := [i for i in state_dict["state"] if i not in ids]:
        raise ValueError(f"the state dict has the state of a parameter {strangers[0]!r}, which is in no group; {HINT}")


def _checked_group(n: int, saved: Group, own: Group) -> Group:
    """A saved group by the names of this version; what an earlier one lacked is what that version did.

    Raises:
        ValueError: a value outside its bounds, a group of the other class, or one that version 0.1.0 saved with an
            option that is gone, on which the run depends.
    """
    is_vadam = saved.get("hess_approx") == "fisher"
    gone = {"antithetic": True, "beta2": "auto", **({"step_rule": "newton"} if is_vadam else {"hess_init": "auto"})}
    found = [f"{name}={value!r}" for name, value in gone.items() if saved.get(name) == value]
    if found:
        raise ValueError(f"group {n} of the state dict was saved with {', '.join(found)}, which is gone")
    group = {**DEFAULTS, **COUNTERS, "lr_limit": own["lr_limit"], **saved}
    for name in GONE:
        group.pop(name, None)
    if is_vadam:
        group.update(algorithm="vadam", hess_approx="gradsq", hess_init=1.0, rescale_lr=False)
    check_group({**own, **group})
    if group["algorithm"] != own["algorithm"]:
        saver = {"ivon": "IVON", "vadam": "VAdam"}[group["algorithm"]]
        raise ValueError(f"group {n} of the state dict was saved by {saver}: load it into an optimizer of that class")
    return group


def _check_entry(n: int, p: Tensor, entry: dict[str, Any]) -> None:
    if entry and not {"step", "momentum", "hess"} <= entry.keys():
        raise ValueError(
            f"the state of parameter {n} has {sorted(map(str, entry))}, not IVON's momentum and hess; {HINT}"
        )
    step = entry.get("step", 0.0)
    if not (step.numel() == 1 if isinstance(step, Tensor) else isinstance(step, Real)):
        raise ValueError(f"step of parameter {n} is {_shape(step)}, not a tensor of one element; {HINT}")
    for name in ("momentum", "hess", "mean"):
        value = entry.get(name)
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.shape != p.shape:
            raise ValueError(f"{name} of parameter {n} is {_shape(value)}, the parameter {tuple(p.shape)}; {HINT}")
        if not bool(torch.isfinite(local(value)).all()):
            raise ValueError(f"{name} of parameter {n} is not finite: the checkpoint is damaged; load an earlier one")


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


# ---------------------------------------------------------------- ivon-opt


def is_ivon_opt(state_dict: dict[str, Any]) -> bool:
    """Whether this is a state dict of ivon-opt: its groups carry one flat momentum and one flat Hessian each."""
    return all({"momentum", "hess", "numel"} <= group.keys() for group in state_dict["param_groups"])


def from_ivon_opt(state_dict: dict[str, Any], param_groups: list[dict[str, Any]]) -> dict[str, Any]:
    """A state dict of ivon-opt 0.1.3 in the form of ours.

    Hyperparameters are taken over but for those that ivon-opt does not save (hess_approx, debias, rescale_lr). It does
    not save the number of steps either: a momentum that is not zero counts as past its bias correction. The parameters
    must have had the same order and groups; ValueError if sizes differ.
    """
    state: dict[int, dict[str, Any]] = {}
    groups = []
    for n, (saved, own) in enumerate(zip(state_dict["param_groups"], param_groups, strict=True)):
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
        groups.append({**own, **known, "algorithm": "ivon", "params": ids})
    return {"state": state, "param_groups": groups}
