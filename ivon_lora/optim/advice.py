"""What a step tells its user, once, of a loop that does not do what it seems to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ivon_lora.optim.parameters import Item

if TYPE_CHECKING:
    from ivon_lora.optim.ivon import IVON

UNSAMPLED = (
    "step() without a posterior sample: {happens}. Call optimizer.attach(model) once, for the model whose forward the "
    "loop calls in training mode, or optimizer.train() before the forward pass, or use sampled_params(train=True)."
)

NO_GRADIENT = (
    "no parameter of this optimizer has a gradient, so that it trains nothing: was it made before the model got its "
    "adapter, or left the device 'meta'? Make it afterwards, e.g. with attach_trainer(trainer)"
)

SUPERSEDED = (
    "another optimizer was made for the parameters of this one, or has stepped them, and drives them now: this one "
    "leaves them alone. optimizer.attach(model) takes them back."
)


def report_idle(optimizer: IVON, items: list[Item]) -> None:
    """Nothing is updated.

    Args:
        items: the parameters that have gradients.
    """
    if optimizer.superseded and not items:
        optimizer.warn_once("superseded", SUPERSEDED)
    elif not items and not optimizer.state:
        optimizer.warn_once("no gradient", NO_GRADIENT)


def report_unsampled(optimizer: IVON) -> None:
    """The gradients were taken at the mean."""
    if optimizer.param_groups[0]["algorithm"] == "vadam":
        happens = "the curvature is learned at the mean, and nothing is averaged over the posterior"
        if optimizer.param_groups[0]["batch_size"] == "auto" and optimizer.counted_examples is None:
            happens += (
                "; a step counts as one example, so that its variance is as many times too large as it has examples"
            )
    else:
        happens = "mean and momentum move, the Hessian does not"
    optimizer.warn_once("unsampled", UNSAMPLED.format(happens=happens))
