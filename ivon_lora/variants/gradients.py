"""What a variant may ask of any optimizer: the gradients that will move the means, and how far they move them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ivon_lora.functional.ivon import ADAM_EPSILON
from ivon_lora.optim.ivon import IVON
from ivon_lora.optim.sharding import local, local_grad


@contextmanager
def mean_gradients(optimizer: Optimizer, params: Iterable[Tensor]) -> Iterator[Mapping[Tensor, Tensor]]:
    """Gradients by parameter, to be changed in place, in ``before_step``; those without one are left out.

    Of IVON they are the means over the samples of the step, and the curvature stays that of the gradients as they were
    taken: the posterior keeps its meaning. The weights are the mean inside; what depends on the sample must be computed
    before. Of other optimizers they are ``p.grad``. Of sharded parameters they are the parts in this process.

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
        stated = group["batch_size"]
        batch = stated if isinstance(stated, int) else group["examples_seen"] / max(group["completed_steps"], 1)
        return min(lr, group["lr_limit"]) / ((hess / max(batch, 1)).sqrt() + ADAM_EPSILON)
    if "exp_avg_sq" in state:
        second = local(state.get("max_exp_avg_sq", state["exp_avg_sq"]))
        debias = 1.0 - group["betas"][1] ** float(state["step"])
        return lr / ((second / debias).sqrt() + group["eps"])
    return torch.tensor(lr)
