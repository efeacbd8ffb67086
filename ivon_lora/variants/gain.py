"""What a parameter would gain if it began to train: XGBoost's structure score, read from an optimizer's state."""

from __future__ import annotations

from torch import Tensor

from ivon_lora.optim.sharding import whole
from ivon_lora.optim.vadam import VAdam


def gain(square: Tensor, hess: Tensor, weight_decay: float) -> float:
    """XGBoost's structure score, sum g^2 / (2 (h + delta)): what a Newton step from 0 takes off the loss.

    Args:
        square: the squared gradient of the mean loss, or an unbiased estimate of it, which may be negative.
        hess: its Hessian's diagonal.
        weight_decay: delta, the prior's curvature, XGBoost's lambda.
    """
    return float((square / (2 * (hess + weight_decay))).sum())


def gain_of(optimizer: VAdam, p: Tensor) -> float:
    r"""`gain` of a parameter.

    With V the variance of one example's gradient and g its mean, VAdam's curvature is on average ``h = V + B g^2``, the
    square of its momentum (without the bias of its start) ``g^2 + c V / B``, where c is 1 for the last gradient alone.
    This gives g^2 without the noise, by which large tensors would win, and the Hessian ``V + g^2`` of a good fit.
    """
    state, (_, group) = optimizer.state.get(p, {}), optimizer.parameters.place(p)
    if "hess" not in state:
        return 0.0
    stated, beta, left = group["batch_size"], group["beta1"], group["beta1"] ** float(state["step"])
    batch = stated if isinstance(stated, int) else max(group["examples_seen"] / group["completed_steps"], 1)
    c = (1 - beta) / (1 + beta) * (1 + left) / (1 - left)
    h, moment = whole(state["hess"]), whole(state["momentum"]) / (1 - left)
    square = (moment.square() - c * h / batch) / (1 - c) if c < 1 else moment.square()
    hess = (h - (batch - 1) * square.clamp(min=0)).clamp(min=h / batch)
    return gain(square, hess, float(group["weight_decay"]))
