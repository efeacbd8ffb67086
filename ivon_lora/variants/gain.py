"""What a parameter would gain if it began to train: XGBoost's structure score, read from an optimizer's state."""

from __future__ import annotations

from torch import Tensor

from ivon_lora.optim.sharding import whole
from ivon_lora.optim.vadam import VAdam


def gain(gradient: Tensor, hess: Tensor, weight_decay: float, noise: Tensor | float = 0.0) -> float:
    """XGBoost's structure score, sum (g^2 - noise) / (2 (h + delta)): what a Newton step from 0 takes off the loss.

    Args:
        gradient, hess: of the mean loss.
        weight_decay: delta, the prior's curvature, XGBoost's lambda.
        noise: variance of the gradient; without it large layers win.
    """
    return float(((gradient.square() - noise) / (2 * (hess + weight_decay))).sum())


def gain_of(optimizer: VAdam, p: Tensor) -> float:
    """`gain` of a parameter: the curvature is the batch size times the square of a batch's gradient."""
    state, (_, group) = optimizer.state.get(p, {}), optimizer.parameters.place(p)
    if "hess" not in state:
        return 0.0
    hess, decay = whole(state["hess"]), float(state.get("weight_decay", group["weight_decay"]))
    stated, left = group["batch_size"], group["beta1"] ** float(state["step"])
    batch = stated if isinstance(stated, int) else max(group["examples_seen"] / group["completed_steps"], 1)
    share = (1 - group["beta1"]) / (1 + group["beta1"]) * (1 + left) / (1 - left)  # of one gradient's variance
    return gain(whole(state["momentum"]) / (1 - left), hess, decay, hess * share / batch)
