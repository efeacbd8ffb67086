"""What a variant may ask of an optimizer: the gradients that will move the means, how far, what that gains, the SNR."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ivon_lora.functional.importance import rank_mean
from ivon_lora.functional.ivon import ADAM_EPSILON
from ivon_lora.lora.adapters import LoraAdapter
from ivon_lora.optim.ivon import IVON
from ivon_lora.optim.sharding import local, local_grad, whole
from ivon_lora.optim.vadam import VAdam


@contextmanager
def mean_gradients(optimizer: Optimizer, params: Iterable[Tensor]) -> Iterator[Mapping[Tensor, Tensor]]:
    """Gradients by parameter, to be changed in place, in ``before_step``; those without one are left out.

    Of IVON they are the means over the samples of the step, whose curvature stays that of the gradients as taken, and
    the weights are the mean inside. Of other optimizers they are ``p.grad``; of sharded parameters the local parts.

    Raises:
        ValueError: IVON with ``sync=True`` among several processes, whose gradients are averaged inside the step.
    """
    if not isinstance(optimizer, IVON) or not optimizer.sampling.taken:
        yield {p: grad for p in params if (grad := local_grad(p)) is not None}
        return
    sampling = optimizer.sampling
    if sampling.replicas() is not None:
        raise ValueError("sync=True averages gradients inside the step, where no variant can change them: sync=False")
    sampling.bank()
    places = {id(p): index for index, _, p in optimizer.parameters.listed()}
    sums = {p: sampling.banked[places[id(p)]][0] for p in params if places.get(id(p)) in sampling.banked}
    for gradient in sums.values():
        gradient.div_(sampling.n_banked)
    yield sums
    for gradient in sums.values():
        gradient.mul_(sampling.n_banked)


def group_of(optimizer: Optimizer, p: Tensor) -> dict[str, Any]:
    """The group of a parameter."""
    return next(group for group in optimizer.param_groups if any(q is p for q in group["params"]))


def mean_batch(group: dict[str, Any]) -> float:
    """Examples of a step of VAdam: as stated, or the mean of those counted."""
    stated = group["batch_size"]
    return max(stated if isinstance(stated, int) else group["examples_seen"] / max(group["completed_steps"], 1), 1)


def step_sizes(optimizer: Optimizer, p: Tensor) -> Tensor:
    """Elementwise factor from a gradient to the step that it causes, after the step; of the shape of ``p``, or ().

    lr / (h + weight_decay) for IVON, lr / (sqrt(h / batch_size) + 1e-8) for VAdam, lr / (sqrt(v) + eps) for optimizers
    with Adam's second moment, and lr for others.
    """
    group = group_of(optimizer, p)
    lr, state = float(group["lr"]), optimizer.state.get(p, {})
    if isinstance(optimizer, IVON) and "hess" in state:
        hess = local(state["hess"])
        if group["algorithm"] == "ivon":
            decay = float(group["weight_decay"])
            return (lr * (group["hess_init"] + decay) if group["rescale_lr"] else lr) / (hess + decay)
        return min(lr, group["lr_limit"]) / ((hess / mean_batch(group)).sqrt() + ADAM_EPSILON)
    if "exp_avg_sq" in state:
        second = local(state.get("max_exp_avg_sq", state["exp_avg_sq"]))
        debias = 1.0 - group["betas"][1] ** float(state["step"])
        return lr / ((second / debias).sqrt() + group["eps"])
    return torch.tensor(lr)


def rank_snr(optimizer: IVON, adapter: LoraAdapter) -> Tensor:
    """Of each rank the sum of the mean SNRs of its elements in A and B: (r,)."""
    return torch.stack([rank_mean(whole(optimizer.snr(p)), dim) for _, p, dim in adapter.tensors()]).sum(0)


def gain(square: Tensor, hess: Tensor, weight_decay: float) -> float:
    """XGBoost's structure score, sum g^2 / (2 (h + delta)): what a Newton step from 0 takes off the loss.

    ``square`` is g^2 of the mean loss, or an unbiased estimate of it, which may be negative; ``hess`` its Hessian's
    diagonal h; ``weight_decay`` the prior's curvature delta, XGBoost's lambda.
    """
    return float((square / (2 * (hess + weight_decay))).sum())


def gain_of(optimizer: VAdam, p: Tensor) -> float:
    r"""`gain` of a parameter.

    With V the variance of one example's gradient and g its mean, VAdam's curvature is on average ``h = V + B g^2``, the
    square of its momentum (without the bias of its start) ``g^2 + c V / B``, where c is 1 for the last gradient alone.
    This gives g^2 without the noise, by which large tensors would win, and the Hessian ``V + g^2`` of a good fit.
    """
    state, group = optimizer.state.get(p, {}), group_of(optimizer, p)
    if "hess" not in state:
        return 0.0
    batch, beta, left = mean_batch(group), group["beta1"], group["beta1"] ** float(state["step"])
    c = (1 - beta) / (1 + beta) * (1 + left) / (1 - left)
    h, moment = whole(state["hess"]), whole(state["momentum"]) / (1 - left)
    square = (moment.square() - c * h / batch) / (1 - c) if c < 1 else moment.square()
    hess = (h - (batch - 1) * square.clamp(min=0)).clamp(min=h / batch)
    return gain(square, hess, float(group["weight_decay"]))
